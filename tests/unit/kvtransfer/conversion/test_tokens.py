"""Where tokens lie, against lists of them written out one by one."""

from __future__ import annotations

import dataclasses
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from disaggregated.kv_shard import KVHolding
from kvtransfer.conversion.tokens import TokenMap, TokenPlan
from tests.support.kv_shards import Ranks, model_layout, tokens_of


@st.composite
def holdings(draw: st.DrawFn) -> KVHolding:
    ranks = Ranks(context=draw(st.integers(1, 4)), stripe_tokens=draw(st.sampled_from([0, 1, 3, 4, 8, 16])))
    return draw(st.sampled_from(ranks.holdings(model_layout(block_size=draw(st.sampled_from([1, 4, 8, 16, 64]))))))


@dataclasses.dataclass(frozen=True)
class Case:
    source: KVHolding
    ours: KVHolding
    num_tokens: int
    skip_blocks: int
    is_length_known: bool

    @property
    def num_blocks(self) -> int:
        """Of ours, that this prompt needs."""
        return self.ours.layout.num_blocks_for(len(tokens_of(self.ours, self.num_tokens)))

    def plan(self) -> TokenPlan:
        known = self.num_tokens if self.is_length_known else None
        block_size = self.ours.layout.block_size
        limits: dict[str, Any] = {"num_tokens": known} if known is not None else {}
        return TokenPlan(
            TokenMap.of(self.source, known),
            TokenMap.of(self.ours, known),
            begin=self.skip_blocks * block_size,
            end=self.num_blocks * block_size,
            **limits,
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    source, ours, num_tokens = draw(holdings()), draw(holdings()), draw(st.integers(0, 200))
    needs_length = any(each.shard.num_token_ranks > 1 and not each.shard.stripe_tokens for each in (source, ours))
    full_blocks = len(tokens_of(ours, num_tokens)) // ours.layout.block_size
    skipped = draw(st.integers(0, full_blocks))
    return Case(source, ours, num_tokens, skipped, needs_length or draw(st.booleans()))


@given(holdings(), st.integers(0, 300))
def test_a_map_says_what_the_list_of_a_ranks_tokens_says(holding: KVHolding, num_tokens: int) -> None:
    tokens, where = tokens_of(holding, num_tokens), TokenMap.of(holding, num_tokens)
    assert [where.in_prompt(position) for position in range(len(tokens))] == tokens
    assert [token for token in range(num_tokens) if where.holds(token)] == tokens
    assert [where.in_rank(token) for token in tokens] == list(range(len(tokens)))
    for position in range(num_tokens + 1):
        assert where.in_rank(position) == sum(token < position for token in tokens)


@given(cases())
def test_segments_bring_each_wanted_token_to_its_place_once(case: Case) -> None:
    theirs, ours = tokens_of(case.source, case.num_tokens), tokens_of(case.ours, case.num_tokens)
    source_size, our_size = case.source.layout.block_size, case.ours.layout.block_size
    plan = case.plan()
    landed = {}
    for block in range(case.source.layout.num_blocks_for(len(theirs))):
        for segment in plan.segments(block):
            for offset, into_offset in zip(segment.tokens, segment.into_tokens, strict=True):
                assert 0 <= offset < source_size
                assert 0 <= into_offset < our_size
                there, here = block * source_size + offset, segment.into_block * our_size + into_offset
                assert here not in landed
                landed[here] = theirs[there] if there < len(theirs) else None
    wanted = {
        here: token for here, token in enumerate(ours) if token in set(theirs) and here >= case.skip_blocks * our_size
    }
    beyond = {here: token for here, token in landed.items() if token is None}
    assert {here: token for here, token in landed.items() if token is not None} == wanted
    assert not (case.is_length_known and beyond)
    assert all(len(ours) <= here < case.num_blocks * our_size for here in beyond)


@given(cases())
def test_blocks_said_to_be_here_hold_nothing_wanted_and_there_is_room_for_what_may_come(case: Case) -> None:
    plan = case.plan()
    num_theirs = case.source.layout.num_blocks_for(len(tokens_of(case.source, case.num_tokens)))
    assert not any(plan.is_needed(block) for block in range(min(plan.num_here(), num_theirs)))
    assert plan.num_here() <= num_theirs
    assert plan.num_source_blocks() >= num_theirs


def test_blocks_of_equal_size_go_whole() -> None:
    where = TokenMap.of(KVHolding.whole(model_layout()), None)
    plan = TokenPlan(where, where, begin=0, end=32)
    for block in range(4):
        (segment,) = plan.segments(block)
        assert (segment.offset, segment.into_block, segment.into_offset, segment.count) == (0, block, 0, 8)
