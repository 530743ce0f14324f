"""Where a figure was measured, and how it is kept: one Markdown file a run in `benchmarks/results/`."""

from __future__ import annotations

import dataclasses
import datetime
import os
import pathlib
import platform
import statistics
import subprocess
from collections.abc import Sequence
from typing import Final

import psutil

RESULTS: Final = pathlib.Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a result: what was asked, what was seen, and whether it holds (None: no bar was set)."""

    what: str
    seen: str
    bar: str = ""
    holds: bool | None = None

    def __str__(self) -> str:
        verdict = {True: "yes", False: "**no**", None: ""}[self.holds]
        return f"| {self.what} | {self.seen} | {self.bar} | {verdict} |"


def spread(values: Sequence[float], unit: str, *, scale: float = 1.0) -> str:
    """`median (min to max, n)`: one figure alone says nothing on a shared machine."""
    scaled = [value * scale for value in values]
    return f"{statistics.median(scaled):.1f} {unit} ({min(scaled):.1f} to {max(scaled):.1f}, n={len(scaled)})"


def machine() -> str:
    model = platform.processor() or platform.machine()
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    gib = psutil.virtual_memory().total / 2**30
    cores = len(os.sched_getaffinity(0))
    system = f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    return f"{cores} × {model}, {gib:.0f} GiB, {system}"


def commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=False, cwd=RESULTS).stdout.strip()

    return (git("rev-parse", "--short", "HEAD") or "no commit") + (" + changes" if git("status", "--porcelain") else "")


def origin() -> str:
    """When, what and where: the line that every result carries."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return f"{today}, commit {commit()}, {machine()}"


def write(name: str, title: str, rows: Sequence[Row], notes: str = "") -> pathlib.Path:
    """Print the result and keep it as `results/<name>.md`; a later run of the same name replaces it."""
    lines = [
        f"# {title}",
        "",
        origin(),
        "",
        "| what | seen | bar | holds |",
        "|---|---|---|---|",
        *map(str, rows),
    ]
    text = "\n".join([*lines, "", notes] if notes else lines) + "\n"
    print(text)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.md"
    path.write_text(text)
    return path
