"""What is kept for `previous_response_id` stays within its bound, and is its owner's alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.response_store import ResponseStore, StoredResponse


def stored(num_bytes: int = 0, tenant: str = "") -> StoredResponse:
    return StoredResponse(response=b"x" * num_bytes, input_items=b"", conversation=b"", tenant=tenant)


@given(st.lists(st.tuples(st.sampled_from(["put", "get", "discard"]), st.integers(0, 9), st.integers(0, 3000))))
def test_it_never_holds_more_than_its_bound(steps: list[tuple[str, int, int]]) -> None:
    store = ResponseStore(8000)
    for step, number, num_bytes in steps:
        name = f"resp_{number}"
        if step == "put":
            if store.get(name, tenant="") is None:
                store.put(name, stored(num_bytes))
        elif step == "get":
            store.get(name, tenant="")
        else:
            store.discard(name, tenant="")
            assert store.get(name, tenant="") is None
        store.check_integrity()


def test_the_least_recently_used_goes_first() -> None:
    store = ResponseStore(4 * 1512)
    for name in "abcd":
        store.put(name, stored(1000))
    store.get("a", tenant="")
    store.put("e", stored(1000))
    assert [name for name in "abcde" if store.get(name, tenant="")] == ["a", "c", "d", "e"]


def test_one_that_is_too_large_drives_nobody_out() -> None:
    store = ResponseStore(2000)
    store.put("a", stored(1000))
    store.put("b", stored(5000))
    assert store.get("a", tenant="") is not None
    assert store.get("b", tenant="") is None


def test_to_others_it_does_not_exist() -> None:
    store = ResponseStore(10_000)
    store.put("a", stored(tenant="ann"))
    assert store.get("a", tenant="bob") is None
    assert not store.discard("a", tenant="bob")
    assert store.get("a", tenant="ann") is not None


def test_a_bound_of_nothing_keeps_nothing() -> None:
    store = ResponseStore(0)
    store.put("a", stored())
    assert len(store) == 0
