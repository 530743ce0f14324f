"""Every router of a TensorRT-LLM file loads and is what it says; what is wrong in a `router:` section is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from disaggregated.config.deployment import DeploymentConfig
from disaggregated.config.load import load_deployment
from disaggregated.config.router_keys import ROUTERS
from disaggregated.errors import ConfigError
from orchestrator.routing.conversation import Conversation
from orchestrator.routing.kv_cache_aware import KvCacheAware
from orchestrator.routing.make import make_placer, make_policy
from orchestrator.routing.policies import LeastLoaded, PowerOfTwo, RoundRobin
from orchestrator.routing.weighted import Weighted


def load(folder: Path, router: dict[str, Any], **top: Any) -> DeploymentConfig:
    path = folder / "disagg-config.yml"
    path.write_text(yaml.safe_dump({"model": "m", "context_servers": {"router": router}, **top}))
    return load_deployment(path, {})


@pytest.mark.parametrize(
    ("router", "kind"),
    [
        ({}, type(None)),
        ({"type": "least_ttft"}, type(None)),
        ({"type": "round_robin"}, RoundRobin),
        ({"type": "load_balancing", "use_tokens": True}, LeastLoaded),
        ({"type": "power_of_two"}, PowerOfTwo),
        (
            {
                "type": "kv_cache_aware",
                "use_tokens": False,
                "max_batch_size": 64,
                "tokens_per_block": 32,
                "custom_tokenizer": "x",
                "backfill_block_hashes_on_finish": False,
            },
            KvCacheAware,
        ),
        (
            {
                "name": "conversation",
                "match_threshold": 0.75,
                "tokens_per_block": 128,
                "use_token_ids": False,
                "hash_skip_count": 0,
                "max_sessions": 100_000,
                "session_ttl_s": 60,
            },
            Conversation,
        ),
        ({"type": "weighted", "weights": {"localhost:8001": 90, "*": 10}}, Weighted),
    ],
)
def test_each_router_loads_with_all_its_keys(tmp_path: Path, router: dict[str, Any], kind: type) -> None:
    config = load(tmp_path, router)
    assert isinstance(make_policy(config.context.router), kind)
    assert not config.not_built
    make_placer(config)


def test_every_router_type_of_the_table_can_be_made() -> None:
    assert {"round_robin", "load_balancing", "kv_cache_aware", "conversation"} < set(ROUTERS)


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ({"type": "roundrobin"}, r"context_servers\.router\.type: must be .*did you mean round_robin\?"),
        ({"type": "weighted", "weights": {"a": -1}}, r"context_servers\.router\.weights: must be a section of names"),
        ({"type": "weighted", "weights": {"a": 0}}, r"context_servers\.router\.weights: .*one of them above 0"),
        ({"type": "conversation", "match_threshold": 2}, r"context_servers\.router\.match_threshold: must be between"),
        ({"match_treshold": 0.5}, r"context_servers\.router\.match_treshold: unknown key"),
    ],
)
def test_a_wrong_key_is_named(tmp_path: Path, router: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, router)


def test_weights_without_a_weight_are_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^context_servers\.router\.weights is missing: a router of type"):
        make_placer(load(tmp_path, {"type": "weighted"}))


def test_what_names_a_session_can_be_chosen(tmp_path: Path) -> None:
    top = {
        "session_sources": ["header", "client_address"],
        "conversation_affinity_header_for_subagents": "X-Parent-Session-ID",
        "subagent_affinity_scope": "both",
    }
    config = load(tmp_path, {"type": "conversation"}, **top)
    assert config.session_sources == ("header", "client_address")
    assert (config.subagent_header, config.subagent_scope) == ("X-Parent-Session-ID", "both")
    with pytest.raises(ConfigError, match=r"session_sources: must be a list of .*did you mean header\?"):
        load(tmp_path, {}, session_sources=["headers"])
    with pytest.raises(ConfigError, match="session_sources: names one twice"):
        load(tmp_path, {}, session_sources=["user", "user"])
