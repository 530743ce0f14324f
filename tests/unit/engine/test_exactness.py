"""The law that failover, prefix caching and disaggregation stand on, held to in every mode that the docs call
deterministic: a sequence's logits have the same bits alone and in any company, however its prompt is cut, with and
without cached blocks, after a restart, and wherever its blocks were computed.

Real engines with tiny random models; every step goes through scheduler, block pool and runner as in a server.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import pytest
import torch

from disaggregated.config.server import KVCacheConfig, ServerConfig
from disaggregated.engine.api import (
    ChunkComputed,
    EngineEvent,
    EngineRequest,
    RequestFailed,
    RequestKind,
    ScheduledSequence,
    TokensSampled,
)
from disaggregated.engine.engine import LLMEngine
from disaggregated.engine.engine_limits import EngineLimits
from disaggregated.engine.load import LoadedEngine, load_engine
from disaggregated.engine.ops import native
from disaggregated.engine.ops.native_isa import runnable_isas
from disaggregated.engine.runner import TorchModelRunner
from disaggregated.kv_layout import KVLayout
from disaggregated.sampling_params import SamplingParams
from tests.unit.engine.runners import random_prompt
from tests.unit.engine.tiny_models import VOCAB_SIZE, write_model

NUM_NEW: Final = 5
PROMPT: Final = random_prompt(150, 0, VOCAB_SIZE)
ISAS: Final = runnable_isas()


@dataclasses.dataclass(frozen=True, slots=True)
class Mode:
    ops: str
    """Of DISAGG_OPS."""
    dtype: str
    kv_dtype: str = "auto"
    isa: str = ""
    num_threads: int = 1

    def __str__(self) -> str:
        return "-".join(filter(None, [self.ops, self.isa, self.dtype, self.kv_dtype]))


NATIVE_KV: Final = tuple(name for name in ("float16", "bfloat16", "int8") if name in native.KV_DTYPES)
MODES: Final = (
    Mode("native", "float32"),
    Mode("native", "int8"),
    *(Mode("native", "float32", kv_dtype) for kv_dtype in NATIVE_KV),
    Mode("native", "int8", "float32"),
    Mode("torch", "float32"),
    Mode("torch", "bfloat16"),
    Mode("torch", "int8"),
    Mode("torch", "int8", "float32"),
    Mode("torch", "float32", "int8"),
    Mode("torch", "float32", "fp8"),
)


class RecordingRunner:
    """A runner that remembers the logits of every request, step by step, and samples greedily from them."""

    def __init__(self, runner: TorchModelRunner) -> None:
        self._runner = runner
        self.logits: dict[str, list[torch.Tensor]] = {}

    def execute(self, batch: Sequence[ScheduledSequence]) -> Sequence[Sequence[int]]:
        sampling = [row for row, sequence in enumerate(batch) if sequence.sampling is not None]
        if not sampling:
            return self._runner.execute(batch)
        tokens: list[list[int]] = [[] for _ in batch]
        for row, logits_V in zip(sampling, self._runner.logits(batch), strict=True):
            self.logits.setdefault(batch[row].request_id, []).append(logits_V.clone())
            tokens[row] = [int(logits_V.argmax())]
        return tokens


class Server:
    """One process of a deployment: weights, pool and engine of its own."""

    def __init__(self, model: Path, mode: Mode) -> None:
        pool = KVCacheConfig(max_tokens=8192, tokens_per_block=16, dtype=mode.kv_dtype)
        config = ServerConfig(
            model=str(model), role="generation", dtype=mode.dtype, device="cpu", num_threads=mode.num_threads,
            kv_cache_config=pool,
        )  # fmt: skip
        self.mode = mode
        self.memory = bytearray()
        self.loaded: LoadedEngine = load_engine(config, allocate=self._allocate)

    def _allocate(self, layout: KVLayout) -> bytearray:
        """Full of NaN, so that nothing stale goes unnoticed."""
        self.memory = bytearray(b"\xff" * layout.pool_bytes)
        return self.memory

    def engine(self, *, chunk: int = 512, reuse: bool = False) -> tuple[LLMEngine, RecordingRunner]:
        recorder = RecordingRunner(self.loaded.runner)
        layout = self.loaded.layout
        engine = LLMEngine(
            recorder,
            EngineLimits(
                num_blocks=layout.num_blocks,
                block_size=layout.block_size,
                max_num_tokens=chunk,
                max_batch_size=min(chunk, 32),
                max_seq_len=512,
                vocab_size=VOCAB_SIZE,
                enable_block_reuse=reuse,
            ),
        )
        return engine, recorder

    def alone(self, prompt: Sequence[int] = PROMPT, num_new: int = NUM_NEW) -> list[torch.Tensor]:
        """The logits of a sequence that has a fresh engine for itself."""
        engine, recorder = self.engine()
        engine.submit(request("alone", prompt, num_new))
        run(engine)
        return recorder.logits["alone"]


def request(
    name: str, prompt: Sequence[int] = PROMPT, num_new: int = NUM_NEW, kind: RequestKind = RequestKind.FULL
) -> EngineRequest:
    sampling = SamplingParams(max_tokens=num_new)
    return EngineRequest(request_id=name, kind=kind, token_ids=prompt, sampling=sampling)


def run(engine: LLMEngine) -> list[EngineEvent]:
    events: list[EngineEvent] = []
    while engine.has_work:
        events += engine.step()
        engine.check_integrity()
    return events


def assert_same_bits(ours: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    assert len(ours) == len(expected)
    different = [step for step, (a, b) in enumerate(zip(ours, expected, strict=True)) if not torch.equal(a, b)]
    assert not different, f"logits differ in step {different} of {len(expected)}"
    assert not any(bool(logits.isnan().any()) for logits in ours)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("llama-tied", tmp_path_factory.mktemp("model")).path


@contextlib.contextmanager
def environment(mode: Mode) -> Iterator[None]:
    """What a server of that mode is started with. Skips where there are no native kernels."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISAGG_OPS", mode.ops)
        if mode.isa:
            patch.setenv("DISAGG_NATIVE_ISA", mode.isa)
        if mode.ops == "native" and native.load(1) is None:
            pytest.skip("no native kernels on this machine")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=MODES, ids=str)
def servers(request: pytest.FixtureRequest, model: Path) -> Iterator[tuple[Server, Server]]:
    """Two processes' worth of one mode: each packs and quantises its own weights."""
    with environment(request.param):
        yield Server(model, request.param), Server(model, request.param)


@pytest.fixture(scope="module")
def server(servers: tuple[Server, Server]) -> Server:
    return servers[0]


@pytest.fixture(scope="module")
def expected(server: Server) -> list[torch.Tensor]:
    return server.alone()


@pytest.mark.parametrize("batch_size", [2, 7, 32])
def test_logits_are_the_same_in_any_company(server: Server, expected: list[torch.Tensor], batch_size: int) -> None:
    engine, recorder = server.engine(chunk=256)
    for mate in range(batch_size - 1):
        engine.submit(request(f"mate-{mate}", random_prompt(1 + 7 * mate, mate, VOCAB_SIZE), NUM_NEW + mate % 3))
        if mate == batch_size // 2:
            engine.submit(request("own"))
    if batch_size == 2:
        engine.submit(request("own"))
    run(engine)
    assert_same_bits(recorder.logits["own"], expected)


@pytest.mark.parametrize("chunk", [1, 16, 50, 149, 150])
def test_logits_are_the_same_however_the_prompt_is_cut(
    server: Server, expected: list[torch.Tensor], chunk: int
) -> None:
    engine, recorder = server.engine(chunk=chunk)
    engine.submit(request("own"))
    run(engine)
    assert_same_bits(recorder.logits["own"], expected)


def test_logits_after_a_prompt_are_those_of_decoding_it(server: Server) -> None:
    """The second half of a prompt, decoded token by token as if it had been sampled, or prefilled."""
    short, tokens = PROMPT[:40], [int(logits.argmax()) for logits in server.alone(PROMPT[:40], 24)]
    decoded = server.alone(short, 24)
    for count in (1, 9, 23):
        assert_same_bits(server.alone([*short, *tokens[:count]], 1), decoded[count : count + 1])


@pytest.mark.parametrize("num_shared", [16, 96, 144, 150])
def test_logits_are_the_same_with_cached_blocks(server: Server, expected: list[torch.Tensor], num_shared: int) -> None:
    engine, recorder = server.engine(chunk=64, reuse=True)
    engine.submit(request("before", [*PROMPT[:num_shared], *random_prompt(30, 9, VOCAB_SIZE)]))
    run(engine)
    engine.submit(request("own"))
    run(engine)
    assert engine.statistics().prompt_cached_tokens_total == num_shared // 16 * 16
    assert_same_bits(recorder.logits["own"], expected)


def test_logits_are_the_same_where_the_prompt_came_from_another_server(
    servers: tuple[Server, Server], expected: list[torch.Tensor]
) -> None:
    """Prefilled beside others on a context server, blocks copied, decoded beside others on a generation server."""
    here, there = servers
    assert here.loaded.fingerprint == there.loaded.fingerprint
    assert here.loaded.layout.difference(there.loaded.layout) is None
    context, prefilled = here.engine(chunk=64)
    for mate in range(3):
        context.submit(request(f"mate-{mate}", random_prompt(33, mate, VOCAB_SIZE)))
    context.submit(request("own", kind=RequestKind.PREFILL_ONLY))
    events = run(context)
    own = [event for event in events if not isinstance(event, RequestFailed) and event.request_id == "own"]
    (first,) = (event.token_ids[0] for event in own if isinstance(event, TokensSampled))
    source = [event for event in own if isinstance(event, ChunkComputed)][-1]
    assert source.num_computed_tokens == len(PROMPT)

    generation, decoded = there.engine()
    for mate in range(6):
        generation.submit(request(f"mate-{mate}", random_prompt(70, mate, VOCAB_SIZE), 20))
    generation.step()
    reservation = generation.reserve(request("own", kind=RequestKind.FROM_REMOTE))
    copy_blocks(here, source.block_ids, there, reservation.block_ids)
    context.release("own")
    assert generation.admit("own", first)
    run(generation)
    assert_same_bits(prefilled.logits["own"] + decoded.logits["own"], expected)


def copy_blocks(source: Server, blocks: Sequence[int], target: Server, into: Sequence[int]) -> None:
    """What a transfer does."""
    ours, theirs = source.loaded.layout, target.loaded.layout
    for layer in range(ours.num_layers):
        for block, to in zip(blocks, into, strict=True):
            begin, end = ours.offset(layer, block), theirs.offset(layer, to)
            target.memory[end : end + theirs.block_bytes] = source.memory[begin : begin + ours.block_bytes]


def test_any_number_of_threads_gives_the_same_bits(servers: tuple[Server, Server], model: Path) -> None:
    """Of the native kernels: torch's own promise nothing of the kind."""
    mode = servers[0].mode
    if mode.ops != "native":
        pytest.skip("torch cuts its sums by the number of threads")
    with environment(mode):
        two = Server(model, dataclasses.replace(mode, num_threads=2)).alone()
    assert_same_bits(two, servers[0].alone())


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("kv_dtype", ["auto", *NATIVE_KV])
def test_instruction_sets_of_one_fingerprint_give_the_same_bits(model: Path, dtype: str, kv_dtype: str) -> None:
    logits: dict[str, list[list[torch.Tensor]]] = {}
    for isa in ISAS:
        mode = Mode("native", dtype, kv_dtype, isa)
        with environment(mode):
            server = Server(model, mode)
            logits.setdefault(server.loaded.fingerprint, []).append(server.alone())
    assert len(logits) < len(ISAS) or len(ISAS) <= 2
    for first, *others in logits.values():
        for other in others:
            assert_same_bits(other, first)
