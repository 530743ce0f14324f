"""Makes the gate that a deployment asks for."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from aiohttp import web

from disaggregated.config.door import DoorConfig
from orchestrator.admission.gate import Caller, Gate
from orchestrator.admission.key_file import KeyFile
from orchestrator.admission.quotas import Levels, OwnLevels, Quotas

CALLER_KEY = web.RequestKey("caller", Caller)


def make_gate(
    config: DoorConfig,
    *,
    clock: Callable[[], float],
    start: Callable[[Coroutine[Any, Any, None]], object],
    levels: Levels | None = None,
) -> Gate:
    """levels: of quotas, where other processes share them.

    Raises:
        ConfigError: the key file cannot be used.
    """
    keys = KeyFile(Path(config.api_keys_file), clock=clock, start=start) if config.api_keys_file else None
    return Gate(keys, Quotas(levels or OwnLevels(), clock=clock))


def caller_of(http: web.Request) -> Caller:
    """The edge has let it in."""
    return http[CALLER_KEY]
