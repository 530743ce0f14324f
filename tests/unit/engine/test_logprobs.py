"""Log-probabilities of tokens: right, the same in any batch, and the likeliest ones in order."""

from __future__ import annotations

import pytest
import torch

from disaggregated.engine.api import ScheduledSequence, WantedLogprobs
from disaggregated.engine.logprobs import NUM_SORTED, PROMPT_TOKENS_AT_ONCE, StepLogprobs, measured, step_logprobs, told
from disaggregated.engine.ops.reference import ReferenceOps
from disaggregated.errors import ServerLost
from disaggregated.sampling_params import LOGPROBS_MAX, SamplingParams
from disaggregated.token_logprobs import PackedLogprobs, TokenLogprob, from_proto, to_proto
from disaggregated.v1 import control_pb2

VOCAB_SIZE = 1003
OPS = ReferenceOps()
SAMPLING = SamplingParams(max_tokens=1)


def logits_of(num_rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 4


def all_told(logits_RV: torch.Tensor, tokens: list[int], num_top: int) -> list[TokenLogprob]:
    found = measured(logits_RV, torch.tensor(tokens), OPS, with_top=num_top > 0)
    return told(found, [num_top] * len(tokens))


def test_they_are_the_logarithm_of_the_softmax() -> None:
    logits = logits_of(50)
    tokens = logits.argsort(-1, descending=True)[torch.arange(50), torch.arange(50) % 7].tolist()
    expected = logits.double().log_softmax(-1)
    for i, one in enumerate(all_told(logits, tokens, 5)):
        assert one.logprob == pytest.approx(float(expected[i, tokens[i]]), abs=1e-5)
        assert one.rank == 1 + i % 7
        values, ids = expected[i].topk(5)
        assert one.top_token_ids == tuple(ids.tolist())
        assert one.top_logprobs == pytest.approx(values.tolist(), abs=1e-5)


def test_a_row_is_told_alike_in_any_company_and_whatever_others_want() -> None:
    logits = logits_of(40, 1)
    tokens = [i * 17 % VOCAB_SIZE for i in range(40)]
    found = measured(logits, torch.tensor(tokens), OPS, with_top=True)
    together = told(found, [i % (LOGPROBS_MAX + 1) for i in range(40)])
    for i, one in enumerate(together):
        assert all_told(logits[i : i + 1], tokens[i : i + 1], i % (LOGPROBS_MAX + 1)) == [one]


def test_of_equals_the_lowest_id_comes_first_and_all_count_for_the_rank() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, [700, 30, 5]] = 4.0
    (one,) = all_told(logits, [700], 4)
    assert one.top_token_ids[:3] == (5, 30, 700)
    assert one.rank == 3
    assert one.top_logprobs[0] == one.logprob


def test_a_vocabulary_smaller_than_what_is_sorted_will_do() -> None:
    (one,) = all_told(torch.tensor([[0.0, 1.0, 2.0]]), [0], LOGPROBS_MAX)
    assert one.top_token_ids == (2, 1, 0)
    assert NUM_SORTED > LOGPROBS_MAX


def row(num_tokens: int, *, samples: bool, wanted: WantedLogprobs | None, num_drafts: int = 0) -> ScheduledSequence:
    return ScheduledSequence(
        request_id="r",
        token_ids=range(num_tokens),
        first_position=0,
        block_table=[0],
        sampling=SAMPLING if samples else None,
        draft_token_ids=[1] * num_drafts,
        logprobs=wanted,
    )


def test_each_row_of_a_step_is_told_what_it_wants_and_nothing_else() -> None:
    """Hidden states are logits here, so that each token's own can be told apart."""
    long = PROMPT_TOKENS_AT_ONCE + 9
    middle = WantedLogprobs(prompt_num_top=2, prompt_targets=range(40, 40 + long), first_target=3)
    drafted, end = WantedLogprobs(num_top=0), WantedLogprobs(num_top=3, prompt_targets=[8])
    batch = [
        row(1, samples=True, wanted=None),
        row(3 + long, samples=False, wanted=middle),
        row(1, samples=True, wanted=drafted, num_drafts=2),
        row(2, samples=True, wanted=end),
    ]
    hidden = logits_of(1 + 3 + long + 3 + 2, 2)
    sampled = [0, *range(4 + long, 4 + long + 3), 4 + long + 4]
    step = StepLogprobs(batch, OPS, torch.Tensor.cpu)
    step.measure_prompts(hidden, lambda hidden_TH: hidden_TH)
    logits = hidden[sampled].clone()
    step.keep(logits)
    logits.fill_(-torch.inf)  # What sampling does to them is not told.
    tokens = [11, 12, 13, 14, 15]
    step.measure(torch.tensor(tokens))
    step.tell()
    assert middle.prompt == all_told(hidden[4 : 4 + long], list(range(40, 40 + long)), 2)
    assert middle.sampled == ()
    assert drafted.sampled == all_told(hidden[sampled[1:4]], tokens[1:4], 0)
    assert end.sampled == all_told(hidden[sampled[4:]], tokens[4:], 3)
    assert end.prompt == all_told(hidden[-2:-1], [8], 0)
    assert step_logprobs(batch[:1], OPS) is None


def test_those_asked_for_by_their_ids_are_told_in_their_order_whatever_others_want() -> None:
    asked = [[700, 2, 9], [], [5]]
    wanted = [WantedLogprobs(num_top=num_top, token_ids=ids) for num_top, ids in zip((0, 4, 2), asked, strict=True)]
    batch = [row(1, samples=True, wanted=one, num_drafts=drafts) for one, drafts in zip(wanted, (1, 0, 0), strict=True)]
    logits, tokens = logits_of(4, 3), [11, 12, 13, 14]
    step = StepLogprobs(batch, OPS, torch.Tensor.cpu)
    step.keep(logits)
    step.measure(torch.tensor(tokens))
    step.tell()
    expected = logits.double().log_softmax(-1)
    assert [one.top_token_ids for one in wanted[0].sampled] == [(700, 2, 9)] * 2
    for place, one in enumerate(wanted[0].sampled):
        assert one.top_logprobs == pytest.approx(expected[place, asked[0]].tolist(), abs=1e-5)
    assert wanted[1].sampled == all_told(logits[2:3], [13], 4)
    assert (wanted[2].sampled[0].top_token_ids, wanted[2].sampled[0].logprob) == (
        (5,), all_told(logits[3:], [14], 0)[0].logprob,
    )  # fmt: skip


def test_they_travel() -> None:
    tokens = all_told(logits_of(3), [5, 6, 7], 4)
    message = to_proto(tokens)
    assert message is not None
    assert from_proto(message) == tokens
    packed = PackedLogprobs(message)
    assert list(packed) == tokens
    assert (packed[-1], packed[1:], len(packed)) == (tokens[-1], tokens[1:], 3)
    with pytest.raises(IndexError):
        packed[3]
    assert to_proto([]) is None
    assert from_proto(control_pb2.Logprobs(logprobs=[-0.5], ranks=[1])) == [TokenLogprob(-0.5, 1)]


@pytest.mark.parametrize(
    "message",
    [
        control_pb2.Logprobs(logprobs=[-1.0]),
        control_pb2.Logprobs(logprobs=[-1.0], ranks=[1], num_top=2, top_token_ids=[1, 2]),
        control_pb2.Logprobs(logprobs=[-1.0], ranks=[1], num_top=2**31),
    ],
)
def test_lists_that_do_not_fit_together_are_not_believed(message: control_pb2.Logprobs) -> None:
    with pytest.raises(ServerLost, match="logprobs of 1 tokens"):
        from_proto(message)
