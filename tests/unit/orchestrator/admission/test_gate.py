from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from disaggregated.errors import InvalidApiKey, InvalidRequest, NotAllowed, QuotaExceeded, UnknownModel
from orchestrator.admission.api_keys import ApiKey, digest_of
from orchestrator.admission.gate import ANYBODY, OPEN_PATHS, Caller, Gate, Visit
from orchestrator.admission.key_file import KeyFile
from orchestrator.admission.quotas import OwnLevels, Quotas
from orchestrator.admission.ticket import Settle, Ticket

USER, OPERATOR = "sk-user-0123456789", "sk-operator-0123456"


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def gate(tmp_path: Path, clock: Clock) -> Gate:
    path = tmp_path / "keys.yml"
    path.write_text(
        f"keys: [{{name: user, key: {USER}, models: [m], best_priority: 3}},"
        f" {{name: boss, key: {OPERATOR}, operator: true}}]"
    )
    path.chmod(0o600)

    def start(work: Coroutine[Any, Any, None]) -> None:
        asyncio.run(work)

    return Gate(KeyFile(path, clock=clock, start=start), Quotas(OwnLevels(), clock=clock))


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def visit(gate: Gate, caller: Caller, *, user: object = None, priority: int = 0) -> Visit:
    return gate.visit(caller, {}, user=user, priority=priority)


def charge_of(visit: Visit) -> Callable[[int], Settle]:
    charge = visit.ticket().charge
    assert charge is not None, "nobody counts its tokens"
    return charge


def test_without_a_key_file_everybody_is_let_in_and_the_user_is_the_tenant(clock: Clock) -> None:
    gate = Gate(None, Quotas(OwnLevels(), clock=clock))
    caller = gate.let_in("/ledger", {})
    assert caller is ANYBODY
    assert visit(gate, caller, user="ann").ticket().tenant == "ann"
    for user in (None, 7, {"id": 1}):
        assert visit(gate, caller, user=user).ticket() == Ticket()
    assert len(caller.tenant("x" * 1000)) == 128
    assert gate.headers(caller) == {}


@pytest.mark.parametrize(
    "headers", [bearer(USER), {"authorization": f"bearer  {USER} "}, {"x-api-key": USER}, {"api-key": USER}]
)
def test_a_key_is_taken_from_wherever_clients_put_it(gate: Gate, headers: dict[str, str]) -> None:
    caller = gate.let_in("/v1/completions", headers)
    assert caller.tenant("somebody else") == "user"


@pytest.mark.parametrize("headers", [{}, bearer(""), bearer("wrong-key-0123456"), {"authorization": f"Basic {USER}"}])
def test_without_a_good_key_only_probes_are_answered(gate: Gate, headers: dict[str, str]) -> None:
    for path in ("/v1/chat/completions", "/v1/models", "/ledger", "/nowhere", "/healthy"):
        with pytest.raises(InvalidApiKey) as caught:
            gate.let_in(path, headers)
        assert caught.value.http_status == 401
        assert "0123456" not in str(caught.value)
    for path in OPEN_PATHS:
        assert gate.let_in(path, headers) is ANYBODY


@pytest.mark.parametrize("path", ["/ledger", "/cluster/scale", "/cluster_info", "/requests/r1"])
def test_what_tells_of_others_is_for_operators(gate: Gate, path: str) -> None:
    with pytest.raises(NotAllowed, match="needs the key of an operator"):
        gate.let_in(path, bearer(USER))
    assert gate.let_in(path, bearer(OPERATOR)).tenant(None) == "boss"


def test_a_model_that_is_not_for_a_key_does_not_exist_for_it(gate: Gate) -> None:
    user, boss = (gate.let_in("/v1/models", bearer(key)) for key in (USER, OPERATOR))
    gate.check_model(user, "m", "org/m", "m")
    gate.check_model(boss, "other", "other")
    with pytest.raises(UnknownModel) as caught:
        gate.check_model(user, "other", "org/other", "other")
    assert (caught.value.http_status, caught.value.param) == (404, "model")


def test_a_priority_better_than_the_keys_best_is_refused_by_name(gate: Gate) -> None:
    user = gate.let_in("/v1/models", bearer(USER))
    visit(gate, user, priority=3)
    visit(gate, ANYBODY, priority=-100)
    with pytest.raises(InvalidRequest, match="priority must be at least 3 for this key, is 2"):
        visit(gate, user, priority=2)


def key(**fields: Any) -> Caller:
    return Caller(ApiKey(name="k", digest=digest_of(USER), **fields))


def test_requests_beyond_a_minutes_worth_are_told_truly_when_to_come_back(gate: Gate, clock: Clock) -> None:
    caller = key(requests_per_minute=6)
    for _ in range(6):
        visit(gate, caller)
    with pytest.raises(QuotaExceeded, match="6 requests a minute") as caught:
        visit(gate, caller)
    assert caught.value.retry_after_s == 10
    clock.now_s += 9.9
    with pytest.raises(QuotaExceeded):
        visit(gate, caller)
    clock.now_s += 0.1
    visit(gate, caller)


def test_tokens_are_charged_as_expected_and_settled_as_they_were(gate: Gate, clock: Clock) -> None:
    caller = key(tokens_per_minute=600)

    charge = charge_of(visit(gate, caller))
    settle = charge(400)
    assert gate.headers(caller) == {
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "200",
        "x-ratelimit-reset-tokens": "40.000s",
    }
    settle(100)
    charge(500)(900)
    with pytest.raises(QuotaExceeded) as caught:
        charge(100)
    assert caught.value.retry_after_s == 50, "400 below nothing, and ten come back a second"
    clock.now_s += 50.0
    charge(100)


def test_a_request_of_more_than_a_minutes_worth_is_granted_to_a_full_bucket_and_paid_for_later(
    gate: Gate, clock: Clock
) -> None:
    caller = key(tokens_per_minute=600)
    charge_of(visit(gate, caller))(6000)(6000)
    with pytest.raises(QuotaExceeded):
        charge_of(visit(gate, caller))(1)
    clock.now_s += 541.0
    charge_of(visit(gate, caller))(1)


def test_what_is_settled_never_fills_a_bucket_above_its_brim(gate: Gate) -> None:
    caller = key(tokens_per_minute=600)
    for _ in range(3):
        charge_of(visit(gate, caller))(10)(0)
    assert gate.headers(caller)["x-ratelimit-remaining-tokens"] == "600"


def test_a_client_may_ask_for_less_time_than_the_deployment_allows_and_not_for_more(gate: Gate) -> None:
    for asked, granted_s in ((None, 180.0), ("2.5", 2.5), ("999", 180.0)):
        headers = {} if asked is None else {"x-request-timeout": asked}
        assert gate.visit(ANYBODY, headers, user=None, priority=0).timeout_s(180.0) == granted_s
