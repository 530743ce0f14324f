"""What happens once before a CUDA runner serves: every kernel it will need is compiled, and its graphs are captured.

All of it computes in a scratch block, one more than the engine knows of.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from typing import Final

import torch

from disaggregated.config.server import ServerConfig
from disaggregated.engine.api import ScheduledSequence
from disaggregated.engine.cuda.graphs import (
    Capture,
    DecodeGraph,
    DecodeGraphs,
    Forward,
    GraphLimits,
    Prepare,
    capture_on_device,
    graph_sizes,
)
from disaggregated.engine.cuda.runner import CudaModelRunner
from disaggregated.engine.kv_cache import KVCache
from disaggregated.engine.models.decoder import Model
from disaggregated.engine.ops.api import Ops
from disaggregated.sampling_params import SamplingParams

log = logging.getLogger(__name__)

GRAPH_CONTEXT_MAX: Final = 32_768
"""Tokens. A wider table would cost every step a larger copy; longer sequences are computed without graphs."""
LONG_CONTEXT: Final = 1024
"""Tokens before a row, enough for its keys to be split among programs."""


def start_runner(
    model: Model,
    kv_cache: KVCache,
    device: torch.device,
    ops: Ops,
    config: ServerConfig,
    *,
    max_seq_len: int,
) -> CudaModelRunner:
    """`kv_cache` has one block more than the engine is told of: the last one is ours."""
    from disaggregated.engine.cuda.kernels.sampling import sample
    from disaggregated.engine.cuda.ops import CudaOps

    assert isinstance(ops, CudaOps), f"the table of a CUDA runner is {ops.name}"

    started_s = time.monotonic()
    runner = CudaModelRunner(model, kv_cache, device, max_rows=config.max_batch_size, sample=sample)
    scratch_block = kv_cache.layout.num_blocks - 1
    for batch in _first_steps(scratch_block, kv_cache.layout.block_size, config.max_num_tokens, max_seq_len):
        runner.execute(batch)
    graphs = config.cuda_graph_config
    if graphs.is_enabled and ops.is_capturable:
        limits = GraphLimits(
            block_size=kv_cache.layout.block_size,
            context_len_max=min(max_seq_len, GRAPH_CONTEXT_MAX),
            scratch_block=scratch_block,
        )
        capture = capture_on_device(torch.cuda.graph_pool_handle())
        wanted = graph_sizes(graphs.batch_sizes, graphs.max_batch_size or config.max_batch_size)
        sizes = [ops.padded_rows(size) for size in wanted]
        runner.graphs = capture_graphs(
            runner,
            sizes,
            limits,
            capture,
            is_padding_enabled=graphs.enable_padding,
            prepare=ops.prepare_decode(kv_cache.layout.block_size),
        )
    log.info(
        "cuda_ready: graphs of %s rows, decode attention by %s, %.1f s",
        runner.graphs.sizes or "no",
        ops.decode_attention,
        time.monotonic() - started_s,
    )
    return runner


def capture_graphs(
    runner: CudaModelRunner,
    sizes: Sequence[int],
    limits: GraphLimits,
    capture: Capture,
    *,
    is_padding_enabled: bool,
    prepare: Prepare | None = None,
) -> DecodeGraphs:
    """The largest first: the smaller ones then find its working memory free."""
    forward: Forward = runner.forward_and_logits
    with torch.inference_mode():
        captured = [
            DecodeGraph(size, limits, runner.last_tokens, forward, capture, prepare=prepare)
            for size in sorted(set(sizes), reverse=True)
        ]
    return DecodeGraphs(captured, is_padding_enabled=is_padding_enabled)


def _first_steps(
    scratch_block: int, block_size: int, max_num_tokens: int, max_seq_len: int
) -> Iterator[list[ScheduledSequence]]:
    """A whole chunk, a short one, and one token; each at the beginning and far into a sequence."""
    for num_tokens in dict.fromkeys((min(max_num_tokens, max_seq_len), min(8, max_num_tokens, max_seq_len), 1)):
        for before in dict.fromkeys((0, min(LONG_CONTEXT, max_seq_len - num_tokens))):
            yield [
                ScheduledSequence(
                    request_id="warm-up",
                    token_ids=[0] * num_tokens,
                    first_position=before,
                    block_table=[scratch_block] * -(-(before + num_tokens) // block_size),
                    sampling=SamplingParams(max_tokens=1),
                )
            ]
