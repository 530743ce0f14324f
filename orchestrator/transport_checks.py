"""Whether the KV transports that a file names can be used by the servers that we start, and whether the two ends meet.

Apart from the other checks of a start because it loads the transfer library, which an orchestrator never needs again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from disaggregated.config.server import CacheTransceiverConfig
from disaggregated.errors import ConfigError
from kvtransfer.negotiate import DEFAULT, Preference

_BACKEND: Final = "cache_transceiver_config.backend"


def check_transports(transceivers: Mapping[str, CacheTransceiverConfig]) -> tuple[str, ...]:
    """transceivers: by role, of the servers that have our Python and our environment.

    Returns sentences about what will be another way than the file says. Raises ConfigError for what cannot work.
    """
    preferences = {role: Preference(each.backend, each.fallback) for role, each in transceivers.items()}
    _check_they_meet(preferences)
    reasons = {each.backend: reason for each in preferences.values() if (reason := each.check())}
    so = "the next best is used, since fallback is true"
    return tuple(f"{_BACKEND}: {name} {reason}; {so}" for name, reason in reasons.items())


def _check_they_meet(preferences: Mapping[str, Preference]) -> None:
    named = {role: each for role, each in preferences.items() if each.backend != DEFAULT and not each.fallback}
    if len({each.backend for each in named.values()}) > 1:
        context, generation = named["context"].backend, named["generation"].backend
        raise ConfigError(
            f"generation_servers.{_BACKEND}: is {generation}, but context_servers.{_BACKEND} is {context}: blocks can "
            "never travel; name one for both, or set cache_transceiver_config.fallback: true in one of them"
        )
