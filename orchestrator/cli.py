"""The `disaggregated` command.

Everything heavy is imported inside the verb that needs it, so that `--help` and mistakes answer at once.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import click

from disaggregated import __version__
from disaggregated.config.one_line import EXIT_USAGE, one_line_errors

DEFAULT_URL: Final = "http://localhost:8000"
_ROLE_FLAGS: Final = ("--server_role", "--server-role")
_MODULES: Final = {
    "context": "context_server",
    "generation": "generation_server",
    "mixed": "orchestrator.serve_mixed",
}
_POOLS: Final = ("context", "generation")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    with one_line_errors("disaggregated"):
        disaggregated(arguments, prog_name="disaggregated", standalone_mode=False)
    sys.exit(0)


class _DefaultVerb(click.Group):
    """`disaggregated -c FILE` means `disaggregated run -c FILE`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args:
            click.echo(ctx.get_help(), err=True)
            sys.exit(EXIT_USAGE)
        if args and args[0].startswith("-") and args[0] not in ("-h", "--help", "--version"):
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] == "disaggregated":  # As in `trtllm-serve disaggregated -c FILE`.
            args = ["run", *args[1:]]
        return super().resolve_command(ctx, args)


def _same_spelling(name: str) -> str:
    return name.replace("_", "-")


SETTINGS: Final[dict[str, Any]] = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": _same_spelling,
    "max_content_width": 100,
}


@click.group(cls=_DefaultVerb, context_settings=SETTINGS)
@click.version_option(__version__, message="%(version)s")
def disaggregated() -> None:
    """Serve one language model with prefill and decode in pools of their own.

    \b
    Start everything on this machine:      disaggregated -c disagg-config.yml
    See a chat being served, step by step: disaggregated demo
    Start one server of a pool:            disaggregated serve context MODEL --port 8001
    Serve from one process, not split:     disaggregated serve mixed MODEL
    Change a running deployment:           disaggregated scale generation=2
    Show it, and how its KV travels:       disaggregated status
    See why a request went where it did:   disaggregated why REQUEST_ID
    See what this machine can do:          disaggregated doctor
    """


def _checked_log_level(_: click.Context, __: click.Parameter, text: str | None) -> str | None:
    from disaggregated.config.kinds import BadValue
    from disaggregated.config.server_cli import LOG_LEVEL

    try:
        return None if text is None else str(LOG_LEVEL.from_text(text))
    except BadValue as error:
        raise click.UsageError(f"--log_level: {error}") from None


_SECONDS: Final = click.FloatRange(min=0.001)
_DEPLOYMENT_FILE: Final = click.Path(path_type=Path)


@disaggregated.command("run", context_settings=SETTINGS)
@click.option("-c", "--config-file", required=True, type=_DEPLOYMENT_FILE, help="The deployment, in YAML.")
@click.option("-t", "--server-start-timeout", "server_start_timeout_s", type=_SECONDS, help="For a server to be ready.")
@click.option("-r", "--request-timeout", "request_timeout_s", type=_SECONDS, help="From arrival to last token.")
@click.option("-l", "--log-level", callback=_checked_log_level, help="debug, info, warning or error.")
@click.option(
    "--metrics-log-interval", "metrics_log_interval_s", type=click.FloatRange(min=0), help="A line of totals so often."
)
@click.option("-m", "--metadata-server-config-file", hidden=True)
@click.option("--check", is_flag=True, help="Read the file, say what it comes to, and start nothing.")
def run_verb(config_file: Path, check: bool, metadata_server_config_file: str | None, **overriding: object) -> None:
    """Run a deployment (the default).

    That is the orchestrator, and the servers for which the file names no urls. Stop it with Ctrl-C.

    The verb may be left out: disaggregated -c disagg-config.yml. Times are in seconds.
    """
    from disaggregated.config.load import load_deployment
    from disaggregated.errors import ConfigError

    if metadata_server_config_file:
        raise ConfigError("-m: servers do not register themselves in a metadata server; name them in urls")
    changes: dict[str, Any] = {name: value for name, value in overriding.items() if value is not None}
    config = dataclasses.replace(load_deployment(config_file, os.environ), **changes)
    if not check:
        from orchestrator.run import run

        sys.exit(run(config))
    from orchestrator.start_checks import check_model, check_port, check_start

    for note in (*config.notes, *check_start(config), *check_port(config), *check_model(config)):
        click.echo(f"note: {note}")
    click.echo(f"{config_file.name}: can be started")


@disaggregated.command("serve", context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def serve_verb(arguments: Sequence[str]) -> None:
    """Run one server: context|generation|mixed

    disaggregated serve ROLE MODEL [FLAGS]

    A context or a generation server belongs to an orchestrator, whose file names it in urls. A mixed one comes with its
    own: it prefills, decodes and speaks the OpenAI API.

    \b
    disaggregated serve context MODEL --port 8001 --config context_config.yml
    disaggregated serve MODEL --server_role generation --port 8003
    disaggregated serve mixed MODEL --port 8000
    disaggregated serve context --help     lists the flags
    """
    role, rest = split_role(arguments)
    if role is None:
        if set(arguments) & {"-h", "--help"} or not arguments:
            click.echo(serve_verb.get_help(click.get_current_context()))
            return
        raise click.UsageError(f"say which role: disaggregated serve mixed {arguments[0]} ..., or context, generation")
    folder = str(Path(__file__).parents[1])
    paths = [folder, *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    os.execv(sys.executable, [sys.executable, "-m", _MODULES[role], *rest])


def split_role(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The role, named first or by --server_role in any of its spellings, and the arguments without it."""
    rest = list(arguments)
    if rest and rest[0].lower() in _MODULES:
        return rest[0].lower(), rest[1:]
    for position, argument in enumerate(rest):
        flag, equals, value = argument.partition("=")
        if flag not in _ROLE_FLAGS:
            continue
        end = position + 1 if equals else position + 2
        role = (value if equals else "".join(rest[position + 1 : end])).lower()
        if role not in _MODULES:
            raise click.UsageError(f"{flag}: must be {', '.join(_MODULES)}, is {role!r}")
        return role, rest[:position] + rest[end:]
    return None, rest


@disaggregated.command("scale", context_settings=SETTINGS)
@click.argument("counts", nargs=-1, required=True, metavar="ROLE=COUNT ...")
@click.option("--url", default=DEFAULT_URL, show_default=True, help="The orchestrator.")
@click.option("--timeout", default=300.0, show_default=True, help="Seconds to wait until it is done.")
def scale_verb(counts: Sequence[str], url: str, timeout: float) -> None:
    """Change the number of servers.

    disaggregated scale generation=2 context=0: requests go on meanwhile.

    Returns when the new servers are ready and those let go have finished their requests.
    """
    from orchestrator.remote_control import scale

    wanted: dict[str, int] = {}
    for text in counts:
        role, _, count = text.partition("=")
        if role not in _POOLS or not count.isdigit():
            raise click.UsageError(f"{text}: must be context=COUNT or generation=COUNT")
        wanted[role] = int(count)
    scale(url, wanted, timeout_s=timeout)
    click.echo(", ".join(f"{role}: {count}" for role, count in wanted.items()))


@disaggregated.command("status", context_settings=SETTINGS)
@click.option("--url", default=DEFAULT_URL, show_default=True, help="The orchestrator.")
def status_verb(url: str) -> None:
    """Show a running deployment and its KV links.

    Each server with its load and free blocks; each link with its transport, what went over it, how fast, and why that
    transport. Exits with 1 when no request can be served.
    """
    from orchestrator.remote_control import status

    lines, is_serving = status(url)
    click.echo("\n".join(lines))
    sys.exit(0 if is_serving else 1)


@disaggregated.command("why", context_settings=SETTINGS)
@click.argument("request_id")
@click.option("--url", default=DEFAULT_URL, show_default=True, help="The orchestrator.")
def why_verb(request_id: str, url: str) -> None:
    """Show where the time of a request went.

    Then, for each attempt, which servers could have taken it and what each was thought to cost.
    """
    from rich.console import Console

    from orchestrator.remote_control import story
    from orchestrator.waterfall import candidates, waterfall

    console = Console()
    for sequence in story(url, request_id):
        console.print(waterfall(sequence))
        for attempt in sequence["attempts"]:
            console.print()
            console.print(candidates(attempt))


@disaggregated.command("doctor", context_settings=SETTINGS)
@click.option("--measure/--no-measure", default=True, help="Move bytes over each transport between two processes.")
def doctor_verb(measure: bool) -> None:
    """Say what this machine can do.

    Cores, memory, compiler, GPU, network cards, cluster secret; then each transport: 64 MiB are moved over it between
    two processes, or it is said what is missing. Exits with 1 when something is broken.
    """
    from orchestrator.doctor import doctor

    sys.exit(0 if doctor(with_measurements=measure) else 1)


@disaggregated.command("demo", context_settings=SETTINGS)
@click.option("-c", "--config-file", type=_DEPLOYMENT_FILE, help="Another deployment than the built-in one.")
@click.option("--prompt", default="What is the capital of Germany, and what is it known for?", show_default=True)
@click.option("--max-tokens", default=96, show_default=True)
def demo_verb(config_file: Path | None, prompt: str, max_tokens: int) -> None:
    """Chat once and see how it was served.

    Starts a small deployment for it, and stops it afterwards.
    """
    from orchestrator.demo import demo

    demo(config_file, prompt=prompt, max_tokens=max_tokens)
