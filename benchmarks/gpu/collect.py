"""From the figures of one `make gpu` to its report."""

from __future__ import annotations

import dataclasses
import datetime
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any, Final

NOT_RUN: Final = "not yet run on a GPU"


@dataclasses.dataclass(frozen=True, slots=True)
class PartResult:
    name: str
    outcome: str
    """"passed", "failed" or "skipped"."""
    words: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.name}: {self.outcome} in {self.seconds:.0f} s {self.words}".rstrip()


def write_report(path: pathlib.Path, results: Sequence[PartResult], figures: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report(results, figures, machine=machine(), commit=_commit()))


def report(results: Sequence[PartResult], figures: Sequence[Mapping[str, Any]], *, machine: str, commit: str) -> str:
    """`figures` are in the order in which they were measured: what, seen, and, where there is one, share and of."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    lines = ["# CUDA path: checks and figures", "", f"{today}, commit {commit}, {machine}", ""]
    lines += ["| part | outcome | seconds | |", "|---|---|---|---|"]
    lines += [f"| {r.name} | {r.outcome} | {r.seconds:.0f} | {r.words} |" for r in results]
    lines += ["", "| what | seen | share | of |", "|---|---|---|---|"]
    for figure in figures:
        share = f"{figure['share']:.2f}" if "share" in figure else ""
        lines.append(f"| {figure['what']} | {figure['seen']} | {share} | {figure.get('of', '')} |")
    if not figures:
        lines.append(f"| everything | {NOT_RUN} | | |")
    return "\n".join(lines) + "\n"


def machine() -> str:
    import torch

    if not torch.cuda.is_available():
        return f"{platform.machine()} without a GPU, torch {torch.__version__}"
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, torch {torch.__version__}"


def _commit() -> str:
    from benchmarks.report import commit

    try:
        return commit()
    except OSError:  # The machine has no git.
        return "unknown"
