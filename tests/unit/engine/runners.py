"""A runner for a model directory without a server around it, and sequences that a test drives by hand."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path

import torch

from disaggregated.engine.api import ScheduledSequence
from disaggregated.engine.kv_cache import KVCache
from disaggregated.engine.ops.api import Ops
from disaggregated.engine.ops.reference import ReferenceOps
from disaggregated.engine.runner import TorchModelRunner
from disaggregated.engine.weights import SafetensorsSource, build_model
from disaggregated.kv_layout import KVLayout
from disaggregated.model_files import ModelConfig
from disaggregated.sampling_params import SamplingParams

NUM_BLOCKS = 160
GREEDY = SamplingParams(max_tokens=1)


def make_runner(
    path: Path,
    *,
    dtype: str = "float32",
    kv_dtype: str | None = None,
    block_size: int = 16,
    device: str = "cpu",
    ops: Ops | None = None,
) -> TorchModelRunner:
    """On CPU its pool is full of NaN to begin with, so nothing stale can go unnoticed. `kv_dtype`: else `dtype`."""
    config, ops = ModelConfig.load(path), ops or ReferenceOps()
    target, torch_dtype = torch.device(device), getattr(torch, dtype)
    with torch.inference_mode(), SafetensorsSource(path) as source:
        decoder = build_model(source, config, ops, device=target, dtype=torch_dtype, num_positions=1024)
    layout = KVLayout(
        **dataclasses.asdict(config.kv_shape),
        block_size=block_size,
        dtype=kv_dtype or dtype,
        num_blocks=NUM_BLOCKS,
    )
    cache = KVCache(layout, device=target, allocate=lambda layout: bytearray(b"\xff" * layout.pool_bytes))
    stale = cache.layers[0].values if cache.layers[0].scales is None else cache.layers[0].scales
    assert target.type != "cpu" or bool(stale.isnan().all())
    return TorchModelRunner(decoder, cache, target)


@dataclasses.dataclass(slots=True)
class Driven:
    """A sequence that a test takes through a runner, chunk by chunk."""

    token_ids: list[int]
    block_table: list[int]
    sampling: SamplingParams = GREEDY
    num_computed: int = 0

    @property
    def prompt_left(self) -> int:
        return len(self.token_ids) - self.num_computed

    def take(self, num_tokens: int) -> ScheduledSequence:
        """The next `num_tokens`; sampling after the last one known."""
        start, end = self.num_computed, min(self.num_computed + num_tokens, len(self.token_ids))
        self.num_computed = end
        return ScheduledSequence(
            request_id="driven",
            token_ids=self.token_ids[start:end],
            first_position=start,
            block_table=self.block_table[: -(-end // 16)],
            sampling=self.sampling if end == len(self.token_ids) else None,
        )


def generate(
    runner: TorchModelRunner, sequences: Sequence[Driven], num_tokens: int, chunk_sizes: Sequence[int]
) -> list[list[int]]:
    """Run all together, sequence i in chunks of `chunk_sizes[i]`, until each has `num_tokens` more."""
    lengths = [len(sequence.token_ids) for sequence in sequences]
    while True:
        open_ones = [i for i, sequence in enumerate(sequences) if len(sequence.token_ids) < lengths[i] + num_tokens]
        if not open_ones:
            return [sequence.token_ids[length:] for sequence, length in zip(sequences, lengths, strict=True)]
        tokens = runner.execute([sequences[i].take(chunk_sizes[i]) for i in open_ones])
        for i, sampled in zip(open_ones, tokens, strict=True):
            sequences[i].token_ids.extend(sampled)


def random_blocks(count: int, seed: int, taken: Sequence[int] = ()) -> list[int]:
    free = sorted(set(range(NUM_BLOCKS)) - set(taken))
    return random.Random(seed).sample(free, count)


def random_prompt(length: int, seed: int, vocab_size: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, vocab_size) for _ in range(length)]


def last_logits(runner: TorchModelRunner, prompt: list[int], sizes: Sequence[int], seed: int) -> torch.Tensor:
    """(V) after the prompt, computed in chunks of `sizes`, again and again, in blocks of their own."""
    sequence = Driven(list(prompt), random_blocks(-(-len(prompt) // 16), seed))
    while True:
        for size in sizes:
            chunk = sequence.take(size)
            if chunk.sampling is not None:
                return runner.logits([chunk])[0]
            runner.execute([chunk])
