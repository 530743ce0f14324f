"""A cache that stays within its bound, whatever is put into it."""

from __future__ import annotations

import concurrent.futures

from hypothesis import given
from hypothesis import strategies as st

from disaggregated.bounded_cache import BoundedCache


def test_what_was_kept_first_is_forgotten_first() -> None:
    cache: BoundedCache[str, int] = BoundedCache(10, entry_max=5)
    for number, key in enumerate("abc"):
        cache.keep(key, number, size=4)
    assert [cache.get(key) for key in "abc"] == [None, 1, 2]


def test_what_is_too_large_pushes_nothing_out() -> None:
    cache: BoundedCache[str, int] = BoundedCache(10, entry_max=5)
    cache.keep("a", 1, size=5)
    cache.keep("b", 2, size=6)
    assert (cache.get("a"), cache.get("b")) == (1, None)


def test_a_value_that_is_there_stays_and_is_counted_once() -> None:
    cache: BoundedCache[str, int] = BoundedCache(10, entry_max=10)
    for value in (1, 2, 3):
        cache.keep("a", value, size=6)
    assert cache.get("a") == 1
    cache.keep("b", 4, size=4)
    assert (cache.get("a"), cache.get("b")) == (1, 4)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 8)), max_size=60))
def test_the_sizes_of_what_is_kept_never_pass_the_bound(steps: list[tuple[int, int]]) -> None:
    cache: BoundedCache[int, int] = BoundedCache(20, entry_max=6)
    sizes: dict[int, int] = {}
    for key, size in steps:
        if cache.get(key) is None:
            sizes[key] = size
        cache.keep(key, key, size=size)
        kept = [each for each in sizes if cache.get(each) is not None]
        assert sum(sizes[each] for each in kept) <= 20
        assert len(cache) == len(kept)
        assert size > 6 or cache.get(key) == key, "what has just been kept is there"


def test_threads_do_not_lose_count() -> None:
    cache: BoundedCache[int, int] = BoundedCache(100, entry_max=10)
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda key: cache.keep(key % 500, key, size=1 + key % 10), range(20_000)))
    cache.keep(-1, -1, size=10)
    assert cache.get(-1) == -1
    assert 10 <= len(cache) <= 100
