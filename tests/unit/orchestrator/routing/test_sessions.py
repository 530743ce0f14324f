"""What names the conversation of a request."""

from __future__ import annotations

from typing import Any

import pytest

from disaggregated.config.deployment import DeploymentConfig, PoolConfig, RouterConfig
from disaggregated.config.server import ServerConfig
from orchestrator.api.fields import Fields
from orchestrator.api.sessions import Sessions, sessions_of
from tests.support.exchanges import FakeExchange


def config(**changes: Any) -> DeploymentConfig:
    pool = PoolConfig(server=ServerConfig(model="m", role=""), router=RouterConfig(type="conversation"))
    return DeploymentConfig(context=pool, generation=pool, **changes)


def named(body: dict[str, Any], headers: dict[str, str] | None = None, **changes: Any) -> Sessions:
    return sessions_of(config(**changes), FakeExchange(headers), Fields(body))


def test_the_first_source_that_says_something_counts() -> None:
    everything = {"conversation_params": {"conversation_id": "a"}, "user": "u"}
    assert named(everything, {"x-session-id": "h"}).generation == "session:a"
    assert named({"user": "u"}, {"x-session-id": "h"}).generation == "session:h"
    assert named({"user": "u"}).generation == "user:u"
    assert named({}) == Sessions("", "")
    assert named(everything, session_sources=("user",)).context == "user:u"


@pytest.mark.parametrize(
    "header", ["X-Session-ID", "X-Correlation-ID", "X-Session-Affinity", "X-Multi-Turn-Session-ID"]
)
def test_each_known_header_names_a_session(header: str) -> None:
    assert named({}, {header.title(): " h "}).context == "session:h"


@pytest.mark.parametrize("field", ["conversation_id", "session_id", "prompt_cache_key"])
def test_each_known_field_names_a_session(field: str) -> None:
    assert named({field: "f"}).context == "session:f"


@pytest.mark.parametrize("body", [{"user": 7}, {"user": ""}, {"conversation_params": 3}, {"session_id": ["x"]}])
def test_what_is_no_text_names_nothing(body: dict[str, Any]) -> None:
    assert named(body).context == ""


def test_where_a_request_comes_from_counts_only_where_that_is_asked_for() -> None:
    headers = {"x-forwarded-for": "10.0.0.7, 10.0.0.1"}
    assert named({}, headers).context == ""
    assert named({}, headers, session_sources=("forwarded_for",)).context == "address:10.0.0.7"


def test_an_agents_request_goes_where_its_parents_session_is() -> None:
    headers = {"X-Parent": "p", "x-session-id": "own"}
    assert named({}, headers) == Sessions("session:own", "session:own")
    assert named({}, headers, subagent_header="x-parent") == Sessions("agent:p", "session:own")
    both = named({}, headers, subagent_header="x-parent", subagent_scope="both")
    assert both == Sessions("agent:p", "agent:p")


def test_nobody_reads_names_where_no_router_wants_them() -> None:
    pool = PoolConfig(server=ServerConfig(model="m", role=""))
    request = FakeExchange({"x-session-id": "h"})
    assert sessions_of(DeploymentConfig(context=pool, generation=pool), request, Fields({"user": "u"})) == Sessions()


def test_names_are_cut() -> None:
    assert named({"user": "u" * 10_000}).context == "user:" + "u" * 128
