"""What `disaggregated serve mixed` makes of its command line."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from disaggregated.config.deployment import DeploymentConfig
from disaggregated.config.server_cli import model_command
from orchestrator.serve_mixed import HELP, how_to_call, mixed_deployment


def deployment_of(*arguments: str) -> DeploymentConfig:
    """What the command hands to the orchestrator."""
    made: list[DeploymentConfig] = []

    def main(model: str, fields: dict[str, object]) -> int:
        made.append(mixed_deployment(model, fields))
        return 0

    with pytest.raises(SystemExit) as ended:
        model_command("serve_mixed", HELP, main)(["m", *arguments])  # type: ignore[arg-type]
    assert ended.value.code == 0
    return made[0]


def test_it_is_one_generation_server_and_no_context_server() -> None:
    config = deployment_of()
    assert config.model == "m"
    assert (config.context.num_instances, config.generation.num_instances) == (0, 1)
    assert not config.context.urls + config.generation.urls
    assert config.generation.server.model == "m"


def test_host_and_port_are_those_of_the_api() -> None:
    config = deployment_of("--host", "0.0.0.0", "--port", "8123", "--log_level", "debug")
    assert (config.hostname, config.port, config.log_level) == ("0.0.0.0", 8123, "debug")
    server = config.generation.server
    assert (server.host, server.port, server.log_level) == ("127.0.0.1", 0, "debug")


def test_the_flags_of_a_server_reach_the_engine(tmp_path: Path) -> None:
    path = tmp_path / "options.yml"
    path.write_text("max_batch_size: 3\nmax_num_tokens: 64\nkv_cache_config: {max_tokens: 900}\n")
    server = deployment_of("--config", str(path), "--max-num-tokens=128").generation.server
    assert (server.max_batch_size, server.max_num_tokens, server.kv_cache_config.max_tokens) == (3, 128, 900)


@pytest.mark.parametrize(("flags", "spreads"), [([], True), (["--num_threads", "1"], False)])
def test_the_launcher_deals_the_cores_out_unless_threads_are_named(flags: list[str], spreads: bool) -> None:
    assert deployment_of(*flags).generation.spread_threads is spreads


def test_a_context_server_that_is_added_later_is_told_the_same() -> None:
    config = deployment_of("--max_seq_len", "512", "--num_threads", "2")
    assert config.context.server.role == "context"
    assert (config.context.server.max_seq_len, config.context.server.num_threads) == (512, 2)
    assert config.context.spread_threads is config.generation.spread_threads


def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        model_command("serve_mixed", HELP, lambda model, fields: 0)(["m", "--max_batch_size", "0"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("serve mixed: --max_batch_size: must be at least 1, is 0")


def test_the_command_that_it_shows_is_a_whole_one() -> None:
    line = next(line for line in how_to_call("127.0.0.1:8123", "m").splitlines() if "curl" in line)
    words = shlex.split(line)
    assert words[:2] == ["curl", "http://127.0.0.1:8123/v1/chat/completions"]
    assert json.loads(words[-1])["model"] == "m"
