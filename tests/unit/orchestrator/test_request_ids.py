"""The ids that are made here: every one its own, and none tells another."""

from __future__ import annotations

from tests.support.front_door import front_door


async def test_an_id_says_nothing_about_the_one_before_it() -> None:
    async with front_door() as door:
        ids = []
        for _ in range(130):  # More than are drawn at once.
            async with door.http.get(f"{door.url}/version") as answer:
                ids.append(answer.headers["x-request-id"])
    assert len(set(ids)) == len({each[:12] for each in ids}) == len({each[12:] for each in ids}) == 130
    assert {len(each) for each in ids} == {24}


async def test_a_clients_own_id_is_kept_where_it_is_safe() -> None:
    async with front_door() as door:
        for given, is_kept in (("my-id_7", True), ("two words", False), ("x" * 129, False)):
            async with door.http.get(f"{door.url}/version", headers={"x-request-id": given}) as answer:
                assert (answer.headers["x-request-id"] == given) is is_kept
