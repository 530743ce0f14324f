"""The CUDA runner without a device: its graphs, its sampling columns and its steps ahead, over the CPU's op table."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from disaggregated.engine.api import PLACEHOLDER, OverlappingRunner, ScheduledSequence
from disaggregated.engine.cuda.graphs import DecodeGraph, GraphLimits, Replay, graph_sizes
from disaggregated.engine.cuda.runner import CudaModelRunner
from disaggregated.engine.cuda.start import capture_graphs
from disaggregated.engine.cuda.step_input import sampling_columns
from disaggregated.engine.kv_cache import KVCache
from disaggregated.engine.ops.reference import ReferenceOps
from disaggregated.engine.ops.reference_attention import ReferenceAttention
from disaggregated.engine.sample_row import SampleRow, sample_rows
from disaggregated.engine.sampler import sample as sample_in_torch
from disaggregated.engine.weights import DummySource, build_model
from disaggregated.kv_layout import KVLayout
from disaggregated.model_files import ModelConfig
from disaggregated.sampling_params import SamplingParams
from tests.support.servers import VOCAB_SIZE, random_prompt, write_model

NUM_BLOCKS, BLOCK_SIZE = 40, 4
SCRATCH = NUM_BLOCKS
GREEDY = SamplingParams(max_tokens=1)
LIMITS = GraphLimits(block_size=BLOCK_SIZE, context_len_max=64, scratch_block=SCRATCH)


def sample_by_columns(logits_RV: torch.Tensor, columns: torch.Tensor, out_R: torch.Tensor) -> None:
    """What the kernel does, from the same columns; the random number is found again by its bits."""
    for i, (uniform, temperature, _, _, _) in enumerate(columns.t().tolist()):
        if temperature == 0.0:
            out_R[i] = logits_RV[i].argmax()
        else:
            weights = ((logits_RV[i] - logits_RV[i].max()) / temperature).exp().double().cumsum(0)
            out_R[i] = int((weights <= uniform * weights[-1]).sum())


def capture_on_cpu(call: Callable[[], torch.Tensor]) -> tuple[Replay, torch.Tensor]:
    """As a graph: what is launched is launched again over the same places, and writes to the same one."""
    out = call().clone()

    def replay() -> None:
        out.copy_(call())

    return replay, out


class ForgetfulOps(ReferenceOps):
    """The reference keeps a step's plan by the identity of its tensors, which a graph's inputs never change."""

    def embedding(self, token_ids_T: torch.Tensor, table_VH: torch.Tensor) -> torch.Tensor:
        self._rotation = None
        self._attention = ReferenceAttention()
        return super().embedding(token_ids_T, table_VH)


@pytest.fixture
def runner(tmp_path: Path) -> CudaModelRunner:
    config, device = ModelConfig.load(write_model(tmp_path)), torch.device("cpu")
    with torch.inference_mode():
        model = build_model(
            DummySource(config, device), config, ForgetfulOps(), device=device, dtype=torch.float32, num_positions=256
        )
    layout = KVLayout(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        block_size=BLOCK_SIZE,
        dtype="float32",
        num_blocks=NUM_BLOCKS + 1,
    )
    cache = KVCache(layout, device=device, allocate=lambda layout: bytearray(layout.pool_bytes))
    return CudaModelRunner(model, cache, device, max_rows=8, sample=sample_by_columns)


def with_graphs(runner: CudaModelRunner, *sizes: int, padding: bool = True) -> CudaModelRunner:
    runner.graphs = capture_graphs(runner, sizes, LIMITS, capture_on_cpu, is_padding_enabled=padding)
    return runner


class Decoding:
    """Sequences that a test takes through a runner."""

    def __init__(self, lengths: list[int], *, temperature: float = 0.0) -> None:
        free = random.Random(1).sample(range(NUM_BLOCKS), NUM_BLOCKS)
        self.tokens = [random_prompt(length, i) for i, length in enumerate(lengths)]
        self.tables = [[free.pop() for _ in range(-(-(length + 12) // BLOCK_SIZE))] for length in lengths]
        self.samplings = [SamplingParams(max_tokens=1, temperature=temperature, seed=i) for i in range(len(lengths))]

    def row(self, i: int, first: int, *, previous_row: int | None = None) -> ScheduledSequence:
        return ScheduledSequence(
            request_id=str(i),
            token_ids=self.tokens[i][first:] if previous_row is None else [PLACEHOLDER],
            first_position=first,
            block_table=self.tables[i],
            sampling=self.samplings[i],
            previous_row=previous_row,
        )

    def last_rows(self) -> list[ScheduledSequence]:
        return [self.row(i, len(tokens) - 1) for i, tokens in enumerate(self.tokens)]

    def take(self, sampled: object) -> None:
        for own, tokens in zip(self.tokens, sampled, strict=True):  # type: ignore[call-overload]
            own.extend(tokens)

    def generate(self, runner: CudaModelRunner, num_steps: int, *, ahead: bool = False) -> list[list[int]]:
        self.take(runner.execute([self.row(i, 0) for i in range(len(self.tokens))]))
        if not ahead:
            for _ in range(num_steps):
                self.take(runner.execute(self.last_rows()))
            return self.tokens
        pending = runner.launch(self.last_rows())
        for _ in range(num_steps - 1):
            following = runner.launch([self.row(i, len(t), previous_row=i) for i, t in enumerate(self.tokens)])
            self.take(pending.tokens())
            pending = following
        self.take(pending.tokens())
        return self.tokens


def test_it_can_launch_a_step_ahead(runner: CudaModelRunner) -> None:
    assert isinstance(runner, OverlappingRunner)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_graphs_and_steps_ahead_change_no_token(runner: CudaModelRunner, temperature: float) -> None:
    lengths = [3, 9, 17]
    eager = Decoding(lengths, temperature=temperature).generate(runner, 8)
    ahead = Decoding(lengths, temperature=temperature).generate(runner, 8, ahead=True)
    assert runner.graph_steps_total == 0
    with_graphs(runner, 2, 4)
    graphs = Decoding(lengths, temperature=temperature).generate(runner, 8)
    both = Decoding(lengths, temperature=temperature).generate(runner, 8, ahead=True)
    assert eager == ahead == graphs == both
    assert runner.graph_steps_total == 16


def test_dummy_rows_write_to_the_scratch_block_alone(runner: CudaModelRunner) -> None:
    with_graphs(runner, 8)
    sequences = Decoding([5])
    sequences.take(runner.execute([sequences.row(0, 0)]))
    cache = runner._kv_cache.blocks_LBX
    before = cache.clone()
    runner.execute(sequences.last_rows())
    changed = (cache != before).any(-1).any(0).nonzero().flatten().tolist()
    assert set(changed) <= {sequences.tables[0][5 // BLOCK_SIZE], SCRATCH}


def test_a_step_is_computed_without_a_graph_where_none_fits(runner: CudaModelRunner) -> None:
    with_graphs(runner, 2, 4, padding=False)
    assert runner.graphs.sizes == [2, 4]
    two = Decoding([4, 6])
    two.take(runner.execute([two.row(0, 0), two.row(1, 0)]))
    assert runner.graphs.find(two.last_rows()) is not None
    assert runner.graphs.find(two.last_rows()[:1]) is None, "one is no captured size, and padding is off"
    assert runner.graphs.find([two.row(0, 0), two.row(1, 0)]) is None, "prompts"
    drafting = two.last_rows()
    drafting[0] = ScheduledSequence(
        request_id="0", token_ids=[5], first_position=4, block_table=two.tables[0], sampling=GREEDY, draft_token_ids=[7]
    )
    assert runner.graphs.find(drafting) is None, "drafts"
    long = [ScheduledSequence(request_id="l", token_ids=[5], first_position=64, block_table=[], sampling=GREEDY)] * 2
    assert runner.graphs.find(long) is None, "longer than the table"


def test_rows_ahead_are_found_by_their_row_of_the_step_before(runner: CudaModelRunner) -> None:
    """A prompt in the middle, and rows in another order: row numbers count all rows, not those that sample."""
    expected = Decoding([5, 6]).generate(runner, 2)
    sequences = Decoding([5, 6, 8])
    middle = ScheduledSequence(
        request_id="2",
        token_ids=sequences.tokens[2][:4],
        first_position=0,
        block_table=sequences.tables[2],
        sampling=None,
    )
    first = runner.launch([middle, sequences.row(0, 0), sequences.row(1, 0)])
    second = runner.launch([sequences.row(1, 6, previous_row=2), sequences.row(0, 5, previous_row=1)])
    third = runner.launch([sequences.row(0, 6, previous_row=1), sequences.row(1, 7, previous_row=0)])
    chunk, a, b = first.tokens()
    assert list(chunk) == []
    (b2, a2), (a3, b3) = second.tokens(), third.tokens()
    assert [*a, *a2, *a3] == expected[0][5:]
    assert [*b, *b2, *b3] == expected[1][6:]


def test_a_chunk_in_the_middle_of_a_prompt_brings_nothing(runner: CudaModelRunner) -> None:
    row = ScheduledSequence(request_id="x", token_ids=[5, 6], first_position=0, block_table=[3], sampling=None)
    assert runner.execute([row]) == [[]]


def test_drafts_bring_what_would_have_come_one_by_one(runner: CudaModelRunner) -> None:
    expected = Decoding([5]).generate(runner, 4)[0][5:]
    sequences = Decoding([5])
    sequences.take(runner.execute([sequences.row(0, 0)]))
    row = ScheduledSequence(
        request_id="0",
        token_ids=sequences.tokens[0][5:],
        first_position=5,
        block_table=sequences.tables[0],
        sampling=GREEDY,
        draft_token_ids=[expected[1], expected[2], (expected[3] + 1) % VOCAB_SIZE],
    )
    (tokens,) = runner.execute([row])
    assert list(tokens) == expected[1:4]


def test_forbidden_tokens_are_not_sampled(runner: CudaModelRunner) -> None:
    sequences = Decoding([5])
    (likeliest,) = runner.execute([sequences.row(0, 0)])[0]
    row = ScheduledSequence(
        request_id="0",
        token_ids=sequences.tokens[0],
        first_position=0,
        block_table=sequences.tables[0],
        sampling=GREEDY,
        forbidden_token_ids=frozenset({likeliest, VOCAB_SIZE + 5}),
    )
    assert runner.execute([row])[0][0] != likeliest


def test_columns_hold_the_random_number_of_each_position() -> None:
    """The same that the other sampler looks up: the token follows from it."""
    sampling = SamplingParams(max_tokens=1, temperature=0.7, seed=2**63 + 5, top_k=3, top_p=0.5, min_p=0.1)
    row = ScheduledSequence(
        request_id="0",
        token_ids=[1, 2],
        first_position=10,
        block_table=[0],
        sampling=sampling,
        draft_token_ids=[3],
    )
    columns = sampling_columns(sample_rows([row]))
    assert columns.shape == (5, 2)
    assert columns.flags.c_contiguous
    assert columns[1:, 0].tolist() == columns[1:, 1].tolist() == [0.7, 3, 0.5, 0.1]
    assert columns[0, 0] != columns[0, 1]
    flat = torch.zeros(1, 1000)
    drawn = SamplingParams(max_tokens=1, temperature=1.0, seed=2**63 + 5)
    assert sample_in_torch(flat, [SampleRow(drawn, 12)]) == [int(columns[0, 0] * 1000)]


def test_the_sizes_of_graphs_are_those_asked_for_or_grow_with_the_batch() -> None:
    assert graph_sizes((4, 1, 4), 64) == (1, 4)
    assert graph_sizes((), 1) == (1,)
    assert graph_sizes((), 20) == (1, 2, 4, 8, 16, 20)
    assert graph_sizes((), 128)[-4:] == (80, 96, 112, 128)


def test_a_graph_of_an_empty_batch_computes_dummies_only(runner: CudaModelRunner) -> None:
    with torch.inference_mode():
        graph = DecodeGraph(3, LIMITS, runner.last_tokens, runner.forward_and_logits, capture_on_cpu)
        assert graph.run([]).shape == (0, VOCAB_SIZE)
