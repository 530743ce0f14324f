import random

import pytest

from kvtransfer.runs import Run, RunPair, run_pairs, runs, views
from tests.support.kv_pools import SMALL, blocks_of, regions


def test_neighbours_are_joined_and_order_is_kept() -> None:
    assert runs([4, 5, 6, 2, 3, 9]) == (Run(4, 3), Run(2, 2), Run(9, 1))
    assert runs([3, 2, 1]) == (Run(3, 1), Run(2, 1), Run(1, 1))
    assert runs([]) == ()


def test_a_pair_of_runs_needs_neighbours_on_both_sides() -> None:
    assert list(run_pairs([1, 2, 3, 4], [7, 8, 1, 2])) == [RunPair(1, 7, 2), RunPair(3, 1, 2)]


@pytest.mark.parametrize("seed", range(20))
def test_runs_name_exactly_the_blocks_they_were_made_of(seed: int) -> None:
    chance = random.Random(seed)
    source = chance.sample(range(64), chance.randint(0, 64))
    into = sorted(chance.sample(range(64), len(source)))
    assert [block for run in runs(source) for block in range(run.first, run.end)] == source
    pairs = [(pair.source + i, pair.into + i) for pair in run_pairs(source, into) for i in range(pair.count)]
    assert pairs == list(zip(source, into, strict=True))


def test_views_are_the_bytes_of_the_blocks_layer_by_layer() -> None:
    with regions(SMALL) as (pool, _):
        wanted = [5, 6, 1, 30]
        layers = range(1, 3)
        joined = b"".join(views(pool.buffer, SMALL, runs(wanted), layers))
        assert joined == blocks_of(pool, SMALL, wanted)[1:3].tobytes()
