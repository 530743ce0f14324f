"""The ledger of a deployment in which a server is busy: what it cannot tell is said, and the others' is told."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from disaggregated.engine.serving.service import LEDGER_TIMEOUT_S as SERVERS_TIMEOUT_S
from disaggregated.errors import DeadlineExceeded
from disaggregated.v1 import control_pb2
from orchestrator.api.operations import LEDGER_TIMEOUT_S
from tests.support.fake_cluster import FakeClient
from tests.support.front_door import front_door


def test_a_server_has_time_to_say_that_its_engine_does_not_answer() -> None:
    assert LEDGER_TIMEOUT_S >= SERVERS_TIMEOUT_S + 2.0


async def test_a_server_in_a_long_step_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ledger(client: FakeClient, *, timeout_s: float) -> Sequence[control_pb2.LedgerEntry]:
        if client._server.role == "context":
            raise DeadlineExceeded("the engine has not ended its step for 10 s")
        return [control_pb2.LedgerEntry(kind="sequence", owner="r1", count=3)]

    monkeypatch.setattr(FakeClient, "ledger", ledger)
    async with front_door() as door:
        status, answer = await door.get("/ledger")
    assert status == 200
    rows = {row["role"]: row for row in answer["servers"]}
    assert rows["context"]["error"] == "the engine has not ended its step for 10 s"
    assert [entry["owner"] for entry in rows["generation"]["entries"]] == ["r1"]
    assert (answer["queued"], answer["running"]) == (0, 0)
