"""How every command of ours ends when the user was wrong, or the world is: one line on stderr, and an exit code."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import click

from disaggregated.errors import StartupError

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


@contextlib.contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Around a click command in its non-standalone mode. What is our own mistake passes through as a traceback."""
    try:
        yield
    except click.ClickException as error:
        click.echo(f"{program}: {_sentence(error)}", err=True)
        sys.exit(error.exit_code)
    except StartupError as error:
        click.echo(f"{program}: {error}", err=True)
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(EXIT_INTERRUPTED)


def _sentence(error: click.ClickException) -> str:
    message = " ".join(error.format_message().split())
    help_hint = f" (see {error.ctx.command_path} --help)" if isinstance(error, click.UsageError) and error.ctx else ""
    return message + help_hint
