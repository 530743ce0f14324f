"""The plan of a conversion, over random ways to spread a model over ranks."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disaggregated.errors import LayoutMismatch
from disaggregated.kv_shard import KVHolding, KVShard, pipeline_parallel, tensor_parallel
from kvtransfer.conversion.planner import Piece, plan_conversion, refusal
from tests.support.kv_shards import Ranks, model_layout

LAYOUT = model_layout()
WHOLE = KVHolding.whole(LAYOUT)


@st.composite
def spreads(draw: st.DrawFn, num_layers: int, num_heads: int) -> Ranks:
    cuts = sorted(draw(st.sets(st.integers(1, num_layers - 1), max_size=3))) if num_layers > 1 else []
    bounds = [0, *cuts, num_layers]
    stages = tuple(end - begin for begin, end in itertools.pairwise(bounds))
    tensor = draw(st.sampled_from([n for n in (1, 2, 3, 4, 6) if max(n, num_heads) % min(n, num_heads) == 0]))
    return Ranks(tensor, stages, context=draw(st.sampled_from([1, 2])), stripe_tokens=draw(st.sampled_from([0, 8])))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[list[KVHolding], KVHolding]:
    """Every source rank of one spread, and one rank of another."""
    num_layers, num_heads = draw(st.integers(1, 12)), draw(st.sampled_from([1, 2, 3, 4, 8]))
    layout = model_layout(num_layers=num_layers, num_kv_heads=num_heads)
    sources = draw(st.permutations(draw(spreads(num_layers, num_heads)).holdings(layout)))
    return sources, draw(st.sampled_from(draw(spreads(num_layers, num_heads)).holdings(layout)))


def places(piece: Piece, source: KVHolding, ours: KVHolding) -> list[tuple[int, int, int, int]]:
    """Model layer and head, there and here, of each place of a piece."""
    return [
        (source.layers[there], source.heads[there_head], ours.layers[here], ours.heads[here_head])
        for there, here in zip(piece.layers, piece.into_layers, strict=True)
        for there_head, here_head in zip(piece.heads, piece.into_heads, strict=True)
    ]


@given(pairs(), st.integers(0, 100))
def test_every_layer_and_head_comes_once_from_each_token_rank_and_from_its_own_place(
    pair: tuple[list[KVHolding], KVHolding], turn: int
) -> None:
    sources, ours = pair
    plan = plan_conversion(sources, ours, turn=turn)
    taken: Counter[tuple[int, int, int]] = Counter()
    for source, pieces in zip(sources, plan.pieces, strict=True):
        for piece in pieces:
            for layer, head, our_layer, our_head in places(piece, source, ours):
                assert (layer, head) == (our_layer, our_head)
                taken[source.shard.token_rank, layer, head] += 1
    token_ranks = {source.shard.token_rank for source in sources}
    assert taken == Counter((rank, layer, head) for rank in token_ranks for layer in ours.layers for head in ours.heads)


@given(pairs(), st.integers(0, 20))
def test_a_missing_rank_is_refused_when_no_other_holds_the_same(
    pair: tuple[list[KVHolding], KVHolding], turn: int
) -> None:
    sources, ours = pair
    needed = [number for number in range(len(sources)) if plan_conversion(sources, ours, turn=turn).is_needed(number)]
    for number in needed:
        others = sources[:number] + sources[number + 1 :]
        lost = dataclasses.replace(sources[number].shard, head_replica=0)
        if any(dataclasses.replace(other.shard, head_replica=0) == lost for other in others):
            plan_conversion(others, ours, turn=turn)
        else:
            with pytest.raises(LayoutMismatch, match="no source"):
                plan_conversion(others, ours, turn=turn)


@pytest.mark.parametrize("tensor", [4, 8])
def test_replicas_take_turns_over_transfers(tensor: int) -> None:
    layout = model_layout(num_kv_heads=2)
    sources = Ranks(tensor=tensor).holdings(layout)
    loads = Counter(rank for turn in range(tensor) for rank in needed_ranks(sources, KVHolding.whole(layout), turn))
    assert set(loads.values()) == {2}
    assert len(loads) == tensor


def test_replicas_that_read_replicas_take_one_each() -> None:
    sources = Ranks(tensor=4).holdings(model_layout(num_kv_heads=2))
    assert sorted(rank for ours in sources for rank in needed_ranks(sources, ours, 0)) == [0, 1, 2, 3]


def needed_ranks(sources: Sequence[KVHolding], ours: KVHolding, turn: int) -> list[int]:
    plan = plan_conversion(sources, ours, turn=turn)
    return [rank for rank in range(len(sources)) if plan.is_needed(rank)]


def test_only_the_ranks_that_hold_something_of_ours_are_needed() -> None:
    sources = Ranks(tensor=2, stages=(2, 4)).holdings(LAYOUT)
    ours = tensor_parallel(pipeline_parallel(WHOLE, (3, 3), 1), 1, 2)
    plan = plan_conversion(sources, ours)
    assert [plan.is_needed(rank) for rank in range(4)] == [False, False, False, True]
    assert plan.pieces[3] == (Piece(range(1, 4), 0, range(2), 0),)


def test_what_one_source_holds_is_one_piece() -> None:
    assert plan_conversion([WHOLE], WHOLE).pieces == ((Piece(range(6), 0, range(4), 0),),)
    quarter = tensor_parallel(WHOLE, 1, 4)
    assert plan_conversion([WHOLE], quarter).pieces == ((Piece(range(6), 0, range(1, 2), 0),),)
    parts = plan_conversion(Ranks(stages=(1, 5)).holdings(LAYOUT), WHOLE).pieces
    assert parts == ((Piece(range(1), 0, range(4), 0),), (Piece(range(5), 1, range(4), 0),))


def test_a_part_of_a_piece_keeps_its_places() -> None:
    piece = Piece(range(2, 6), 10, range(2), 0)
    assert piece.within(range(6)) == piece
    assert piece.within(range(3, 4)) == Piece(range(3, 4), 11, range(2), 0)
    assert piece.within(range(2)) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_layers": 7}, "num_layers is 6 here and 7 there"),
        ({"num_kv_heads": 2}, "num_kv_heads is 4 here and 2 there"),
        ({"head_dim": 8}, "head_dim is 4 here and 8 there"),
        ({"num_planes": 1}, "num_planes is 2 here and 1 there"),
        ({"dtype": "float4"}, "the source's dtype 'float4' is not known"),
        ({"block_size": 0}, "the source's blocks are empty"),
    ],
)
def test_another_model_is_refused_in_words(changes: dict[str, object], words: str) -> None:
    reason = refusal(KVHolding.whole(model_layout(**changes)), WHOLE)
    assert reason is not None
    assert words in reason
    with pytest.raises(LayoutMismatch):
        plan_conversion([KVHolding.whole(model_layout(**changes))], WHOLE)


@pytest.mark.parametrize(
    ("shard", "words"),
    [
        (KVShard(num_model_layers=6, num_model_heads=4, first_layer=1), "holds 6 layers from 1 on, of 6"),
        (KVShard(num_model_layers=6, num_model_heads=3), "holds 4 KV heads from 0 on, of 3"),
        (KVShard(num_model_layers=6, num_model_heads=4, token_rank=2, num_token_ranks=2), "token rank 2 of 2"),
        (KVShard(num_model_layers=6, num_model_heads=4, num_token_ranks=0), "token rank 0 of 0"),
    ],
)
def test_a_shard_that_cannot_be_is_refused(shard: KVShard, words: str) -> None:
    reason = refusal(KVHolding(layout=LAYOUT, shard=shard), WHOLE)
    assert reason is not None
    assert words in reason


def test_pools_that_differ_in_size_dtype_and_blocks_are_convertible() -> None:
    other = KVHolding.whole(model_layout(num_blocks=3, block_size=64, dtype="int8"))
    assert refusal(other, WHOLE) is None
    assert not other.is_like(WHOLE)
    assert KVHolding.whole(model_layout(num_blocks=3)).is_like(WHOLE)


def test_sources_that_cut_tokens_differently_are_refused() -> None:
    unlike = [*Ranks(context=2).holdings(LAYOUT)[:1], *Ranks(context=2, stripe_tokens=4).holdings(LAYOUT)[1:]]
    with pytest.raises(LayoutMismatch, match="2 different ways"):
        plan_conversion(unlike, WHOLE)
    first, second = Ranks(context=2).holdings(LAYOUT)
    second = dataclasses.replace(second, layout=dataclasses.replace(LAYOUT, block_size=16))
    with pytest.raises(LayoutMismatch, match="different sizes"):
        plan_conversion([first, second], WHOLE)
    with pytest.raises(LayoutMismatch, match="the tokens of rank 1 of 2"):
        plan_conversion([first], WHOLE)
    with pytest.raises(LayoutMismatch, match="there is no source"):
        plan_conversion([], WHOLE)


@pytest.mark.parametrize("ranks", [3, 8, 6])
def test_heads_that_do_not_divide_are_refused(ranks: int) -> None:
    with pytest.raises(ValueError, match="cannot be spread"):
        tensor_parallel(KVHolding.whole(model_layout(num_kv_heads=5)), 0, ranks)
    with pytest.raises(ValueError, match="cannot be cut"):
        pipeline_parallel(WHOLE, (3, ranks + 1), 0)


def test_a_rank_is_described_by_what_sets_it_apart() -> None:
    assert WHOLE.describe() == "whole, 8-token float32"
    rank = Ranks(tensor=2, stages=(2, 4), context=2).holdings(LAYOUT)[-1]
    assert rank.describe() == "layers 2-5 of 6, heads 2-3 of 4, tokens 2/2, 8-token float32"


def test_a_shard_travels() -> None:
    for holding in Ranks(tensor=8, stages=(2, 4), context=2, stripe_tokens=16).holdings(LAYOUT):
        assert KVShard.from_proto(holding.shard.to_proto()) == holding.shard
