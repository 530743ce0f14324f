"""A line that moves while many sequences are generated; on a terminal only."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Final

Advance = Callable[[int, int], object]
"""Told how many sequences are over, and how many tokens there are, since the last call."""

REDRAWS_A_SECOND: Final = 5.0


@contextlib.contextmanager
def progress_line(num_sequences: int, *, is_wanted: bool) -> Iterator[Advance]:
    """Drawn on stderr, and gone when it is over."""
    if not (is_wanted and num_sequences and sys.stderr.isatty()):
        yield lambda num_over, num_tokens: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("sequences"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tokens]} tokens"),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, refresh_per_second=REDRAWS_A_SECOND) as progress:
        line = progress.add_task("", total=num_sequences, tokens=0)
        num_tokens_so_far = 0

        def advance(num_over: int, num_tokens: int) -> None:
            nonlocal num_tokens_so_far
            num_tokens_so_far += num_tokens
            progress.update(line, advance=num_over, tokens=num_tokens_so_far)

        yield advance
