"""Which conversation a request belongs to, so that a router can keep it where its blocks are.

Names are believed as they come: whoever takes another's name gets that one's server, and none of its tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final

from disaggregated.config.deployment import DeploymentConfig
from orchestrator.api.fields import Fields
from orchestrator.http.exchange import Exchange

HEADERS: Final = ("x-session-id", "x-correlation-id", "x-session-affinity", "x-multi-turn-session-id")
"""As TensorRT-LLM reads them, the first that is there."""
FIELDS: Final = ("conversation_id", "session_id", "prompt_cache_key")
CHARACTERS_MAX: Final = 128
"""Of a name; longer ones with the same beginning are one session."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sessions:
    """ "" where nobody says."""

    context: str = ""
    generation: str = ""


NO_SESSIONS: Final = Sessions()


def sessions_of(config: DeploymentConfig, exchange: Exchange, body: Fields) -> Sessions:
    if not config.routes_by_session:
        return NO_SESSIONS
    own = next(filter(None, (_READERS[source](exchange, body) for source in config.session_sources)), "")
    parent = _named("agent", exchange.headers.get(config.subagent_header.lower())) if config.subagent_header else ""
    if not parent:
        return Sessions(own, own)
    return Sessions(parent, parent if config.subagent_scope == "both" else own)


def _named(source: str, value: Any) -> str:
    """A source's name stands before it: user 7 is not session 7. What is no text names nothing."""
    text = value.strip() if isinstance(value, str) else ""
    return f"{source}:{text[:CHARACTERS_MAX]}" if text else ""


def _conversation_id(_: Exchange, body: Fields) -> str:
    params = body.get("conversation_params")
    inner = params.get("conversation_id") if isinstance(params, dict) else None
    return next(filter(None, (_named("session", each) for each in (inner, *map(body.get, FIELDS)))), "")


def _header(exchange: Exchange, _: Fields) -> str:
    return next(filter(None, (_named("session", exchange.headers.get(name)) for name in HEADERS)), "")


def _forwarded_for(exchange: Exchange, _: Fields) -> str:
    return _named("address", exchange.headers.get("x-forwarded-for", "").partition(",")[0])


_READERS: Final[Mapping[str, Callable[[Exchange, Fields], str]]] = {
    "conversation_id": _conversation_id,
    "header": _header,
    "user": lambda _, body: _named("user", body.get("user") or body.get("safety_identifier")),
    "client_address": lambda exchange, _: _named("address", exchange.remote),
    "forwarded_for": _forwarded_for,
}
