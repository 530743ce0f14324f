"""The `disaggregated` command: what a user types, and the one line a mistake gets."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import click
import pytest

from disaggregated.errors import PortTaken
from orchestrator.cli import main, split_role
from orchestrator.listening import address_of, listen

FILE = "model: smollm2-135m-instruct\nport: 0\nenable_chunked_prefill: false\n"


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    path = tmp_path / "disagg-config.yml"
    path.write_text(FILE)
    return str(path)


def run(*arguments: str) -> int:
    """The exit code of `disaggregated ARGUMENTS`."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize("verb", [[], ["run"], ["disaggregated"]])
def test_the_verb_may_be_left_out(capsys: pytest.CaptureFixture[str], config_file: str, verb: list[str]) -> None:
    assert run(*verb, "-c", config_file, "--check") == 0
    captured = capsys.readouterr().out.splitlines()
    assert captured == [
        "note: enable_chunked_prefill: no effect: a prompt over max_num_tokens is always prefilled in chunks",
        "disagg-config.yml: can be started",
    ]


@pytest.mark.parametrize("flags", [["-r", "360000", "-t", "5"], ["--request_timeout=7"], ["--log_level", "DEBUG"]])
def test_the_flags_of_tensorrt_llm_are_taken(config_file: str, flags: list[str]) -> None:
    assert run("-c", config_file, "--check", *flags) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["-c", "/nowhere.yml"], 2, "/nowhere.yml: cannot be read: No such file or directory"),
        (["run"], 2, "Missing option '-c' / '--config-file'. (see disaggregated run --help)"),
        (["-x"], 2, "No such option '-x'. (see disaggregated run --help)"),
        (["statis"], 2, "No such command 'statis'. Did you mean 'status'? (see disaggregated --help)"),
        (["scale", "gen=2"], 2, "gen=2: must be context=COUNT or generation=COUNT (see disaggregated scale --help)"),
        (["scale", "context=-1"], 2, "context=-1: must be context=COUNT or generation=COUNT"),
        (["scale", "mixed=1"], 2, "mixed=1: must be context=COUNT or generation=COUNT"),
        (["serve", "m"], 2, "say which role: disaggregated serve mixed m ..., or context, generation"),
        (["serve", "m", "--server_role", "both"], 2, "--server_role: must be context, generation, mixed, is 'both'"),
        (["status", "--url", "http://127.0.0.1:9"], 1, "no orchestrator answers at http://127.0.0.1:9/health: "),
        (
            ["scale", "context=1", "--url", "127.0.0.1:9"],
            1,
            "no orchestrator answers at http://127.0.0.1:9/cluster/scale: ",
        ),
    ],
)
def test_a_mistake_is_one_line_with_an_exit_code(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, line: str
) -> None:
    assert run(*arguments) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"disaggregated: {line}")


def test_who_says_nothing_is_told_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "\nCommands:\n" in told.err
    assert len(told.err.splitlines()) > 20


def test_a_metadata_server_is_refused_in_words(capsys: pytest.CaptureFixture[str], config_file: str) -> None:
    assert run("-c", config_file, "-m", "etcd.yml") == 2
    assert "servers do not register themselves" in capsys.readouterr().err


def test_a_deployment_that_asks_for_what_is_not_built_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "disagg-config.yml"
    path.write_text("model: m\ntensor_parallel_size: 2\n")
    assert run("-c", str(path), "--check") == 2
    assert capsys.readouterr().err.startswith(
        "disaggregated: tensor_parallel_size: 2 is not built yet: a server has one"
    )


@pytest.mark.parametrize(
    ("arguments", "role", "rest"),
    [
        (["context", "m", "--port", "1"], "context", ["m", "--port", "1"]),
        (["GENERATION", "m"], "generation", ["m"]),
        (["mixed", "m", "--port", "0"], "mixed", ["m", "--port", "0"]),
        (["m", "--server_role", "context", "--port", "1"], "context", ["m", "--port", "1"]),
        (["m", "--server-role=CONTEXT"], "context", ["m"]),
        (["--server_role", "generation", "m"], "generation", ["m"]),
        (["m", "--port", "1"], None, ["m", "--port", "1"]),
    ],
)
def test_the_role_is_named_first_or_by_flag(arguments: list[str], role: str | None, rest: list[str]) -> None:
    assert split_role(arguments) == (role, rest)


def test_a_role_without_a_name_is_a_usage_error() -> None:
    with pytest.raises(click.UsageError):
        split_role(["m", "--server_role"])


def test_help_and_mistakes_load_neither_http_nor_grpc() -> None:
    code = (
        "import sys; from orchestrator import cli\n"
        "heavy = {'aiohttp', 'grpc', 'torch', 'numpy', 'uvloop'} & set(sys.modules)\n"
        "sys.exit(f'{heavy} loaded' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


def test_a_free_port_is_found_and_told() -> None:
    with listen("127.0.0.1", 0) as listener:
        assert address_of(listener) == f"127.0.0.1:{listener.getsockname()[1]}"


def test_a_taken_port_is_named_with_whom_it_belongs_to() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(PortTaken, match=rf"^port {port} of 127\.0\.0\.1 is taken by process \d+ \(.+\); choose"):
            listen("127.0.0.1", port)
