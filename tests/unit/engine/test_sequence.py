from __future__ import annotations

import itertools

import pytest

from disaggregated.block_hash import block_hashes
from disaggregated.engine.api import EngineRequest, FinishReason, RequestKind
from disaggregated.engine.sequence import NEXT, InvalidTransition, Phase, Sequence
from disaggregated.sampling_params import SamplingParams


def new_sequence(
    num_prompt_tokens: int = 5,
    *,
    max_tokens: int = 9,
    min_tokens: int = 0,
    num_tokens_max: int = 100,
    cache_salt: str = "",
) -> Sequence:
    sampling = SamplingParams(max_tokens=max_tokens, min_tokens=min_tokens, stop_token_ids=frozenset({7}))
    token_ids = range(100, 100 + num_prompt_tokens)
    request = EngineRequest(
        request_id="one", kind=RequestKind.FULL, token_ids=token_ids, sampling=sampling, cache_salt=cache_salt
    )
    return Sequence(request, arrival=1, num_tokens_max=num_tokens_max)


@pytest.mark.parametrize(("phase", "to"), list(itertools.product(Phase, Phase)))
def test_a_sequence_moves_as_the_table_says_and_no_other_way(phase: Phase, to: Phase) -> None:
    sequence = new_sequence()
    sequence.phase = phase
    if to in NEXT[phase]:
        sequence.advance(to, now_s=3.0)
        assert sequence.phase is to
        assert sequence.story == [(3.0, to)]
    else:
        with pytest.raises(InvalidTransition, match=f"one: {phase} -> {to}"):
            sequence.advance(to, now_s=3.0)


def test_every_phase_can_be_reached_and_all_but_the_last_can_end() -> None:
    reached = {Phase.NEW}.union(*NEXT.values())
    assert reached == set(Phase)
    assert all(Phase.ENDED in NEXT[phase] for phase in set(Phase) - {Phase.NEW, Phase.ENDED})


def test_hashing_as_the_sequence_grows_equals_hashing_it_at_once() -> None:
    sequence = new_sequence(10)
    for token_id in range(40):
        num_full = len(sequence.token_ids) // 4
        assert sequence.hash_blocks(num_full, 4) == list(block_hashes(sequence.token_ids, 4))[:num_full]
        sequence.token_ids.append(token_id)
    assert sequence.hash_blocks(2, 4) == list(block_hashes(sequence.token_ids, 4))[:2]


def test_sequences_with_other_salts_have_no_block_in_common() -> None:
    unsalted, salted, alike = (new_sequence(20, cache_salt=salt) for salt in ("", "mine", "mine"))
    assert not {*unsalted.hash_blocks(5, 4)} & {*salted.hash_blocks(5, 4)}
    assert salted.hash_blocks(3, 4) + salted.hash_blocks(5, 4)[3:] == alike.hash_blocks(5, 4)
    assert alike.block_hashes == list(block_hashes(alike.token_ids, 4, salt="mine"))


def test_a_stop_token_ends_it_even_as_the_last_allowed_one() -> None:
    assert new_sequence(max_tokens=1).append(7) is FinishReason.STOP
    assert new_sequence(max_tokens=2).append(7) is FinishReason.STOP


def test_max_tokens_and_the_longest_length_end_it() -> None:
    sequence = new_sequence(5, max_tokens=2)
    assert [sequence.append(1), sequence.append(1)] == [None, FinishReason.LENGTH]
    sequence = new_sequence(5, num_tokens_max=7)
    assert [sequence.append(1), sequence.append(1)] == [None, FinishReason.LENGTH]


def test_stop_tokens_are_forbidden_until_min_tokens_are_generated() -> None:
    sequence = new_sequence(min_tokens=2)
    forbidden = []
    for _ in range(4):
        forbidden.append(sequence.forbidden_token_ids)
        sequence.append(1)
    assert forbidden == [{7}, {7}, frozenset(), frozenset()]
