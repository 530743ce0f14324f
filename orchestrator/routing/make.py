"""From a `router:` section of the configuration to a policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from disaggregated.config.deployment import DeploymentConfig, RouterConfig
from disaggregated.errors import ConfigError
from orchestrator.routing.candidate import Policy
from orchestrator.routing.conversation import Conversation
from orchestrator.routing.kv_cache_aware import KvCacheAware
from orchestrator.routing.local_prefill import LocalPrefill
from orchestrator.routing.placement import Placer
from orchestrator.routing.policies import LeastLoaded, PowerOfTwo, RoundRobin
from orchestrator.routing.weighted import Weighted

_MAKERS: Final[Mapping[str, tuple[Callable[..., Policy], tuple[str, ...]]]] = {
    "round_robin": (RoundRobin, ()),
    "load_balancing": (LeastLoaded, ("use_tokens",)),
    "power_of_two": (PowerOfTwo, ("use_tokens",)),
    "kv_cache_aware": (KvCacheAware, ("max_batch_size", "use_tokens", "max_num_tokens")),
    "conversation": (Conversation, ("match_threshold", "hash_skip_count", "max_sessions", "session_ttl_s")),
    "weighted": (Weighted, ("weights",)),
}
"""By type: the policy, and those of the section's keys that it takes."""


def make_policy(router: RouterConfig, section: str = "") -> Policy | None:
    """None: the cost model chooses. section: where the router stands in the file.

    Raises:
        ConfigError: the router type does not exist, or lacks a key.
    """
    if router.type == "least_ttft":
        return None
    if router.type not in _MAKERS:
        raise ConfigError(f"there is no router type {router.type!r}; there are least_ttft, {', '.join(_MAKERS)}")
    maker, names = _MAKERS[router.type]
    args: dict[str, Any] = {name: router.args[name] for name in names if name in router.args}
    if router.type == "weighted" and not args.get("weights"):
        at = f"{section}.router.weights" if section else "router.weights"
        raise ConfigError(f"{at} is missing: a router of type 'weighted' needs a weight for each address or version")
    return maker(**args)


def make_placer(config: DeploymentConfig) -> Placer:
    """Raises as `make_policy` does."""
    return Placer(
        make_policy(config.context.router, "context_servers"),
        make_policy(config.generation.router, "generation_servers"),
        LocalPrefill(num_uncached_max=config.max_local_prefill_length, balances=config.balance_prefill),
    )
