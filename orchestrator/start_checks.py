"""What would fail later, found before anything is started: by `--check`, and by the start itself.

Servers that we start have our Python and our environment, so what is missing here is missing there. Servers with urls
have their own, and find out themselves.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from disaggregated.config.deployment import DeploymentConfig, PoolConfig
from disaggregated.config.load import check_can_start
from disaggregated.errors import ConfigError
from disaggregated.security import secret, tls
from kvtransfer.negotiate import DEFAULT, Preference
from orchestrator.admission.api_keys import read_keys
from orchestrator.admission.http_tls import front_door_tls
from orchestrator.routing.make import make_placer

_BACKEND: Final = "cache_transceiver_config.backend"


def check_start(config: DeploymentConfig, environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Sentences about what will be another way than the file says, and may be so.

    Raises ConfigError, which names the key, for what cannot work: keys that are not built, a router, a secret, a
    certificate or a file of API keys that cannot be used, a transport that is not here, two sections that never meet.
    """
    check_can_start(config)
    make_placer(config)
    security = config.security
    secret.find(environ, file=security.cluster_secret_file, key=security.internal_request_auth_key)
    tls.load(security.tls)
    front_door_tls(config.door)
    if config.door.api_keys_file:
        read_keys(Path(config.door.api_keys_file))
    preferences = {pool.server.role: _preference(pool) for pool in _started_here(config)}
    _check_they_meet(preferences)
    reasons = {each.backend: reason for each in preferences.values() if (reason := each.check())}
    so = "the next best is used, since fallback is true"
    return tuple(f"{_BACKEND}: {name} {reason}; {so}" for name, reason in reasons.items())


def _started_here(config: DeploymentConfig) -> list[PoolConfig]:
    """The pools whose backends must be here; none where no KV travels."""
    if config.context.num_instances == 0:
        return []  # Context servers that come later are told the same when they start.
    return [pool for pool in (config.context, config.generation) if not pool.urls]


def _preference(pool: PoolConfig) -> Preference:
    transceiver = pool.server.cache_transceiver_config
    return Preference(transceiver.backend, transceiver.fallback)


def _check_they_meet(preferences: Mapping[str, Preference]) -> None:
    named = {role: each for role, each in preferences.items() if each.backend != DEFAULT and not each.fallback}
    if len({each.backend for each in named.values()}) > 1:
        context, generation = named["context"].backend, named["generation"].backend
        raise ConfigError(
            f"generation_servers.{_BACKEND}: is {generation}, but context_servers.{_BACKEND} is {context}: blocks can "
            "never travel; name one for both, or set cache_transceiver_config.fallback: true in one of them"
        )
