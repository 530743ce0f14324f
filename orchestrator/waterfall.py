"""The story of one request as bars on a time line, for a terminal."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from rich.table import Table
from rich.text import Text

BAR_WIDTH: Final = 22
"""With the words before it a line fits into 80 columns."""


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    name: str
    where: str
    begin_s: float
    duration_s: float
    color: str = "cyan"


def steps(story: Mapping[str, Any]) -> list[Step]:
    """What `GET /requests/{id}` tells, in the order of time. A transfer's begin is reckoned back from its end."""
    parts = story["ttft_parts"]
    found = []
    if parts:
        found.append(Step("check, render, tokenize", "orchestrator", 0.0, parts["prepare_s"], "blue"))
        found.append(Step("wait in the queue", "orchestrator", parts["prepare_s"], parts["queue_s"], "blue"))
    for attempt in story["attempts"]:
        found += _attempt_steps(attempt, end_s=attempt["ended_s"] or story["e2e_s"])
    return found


def _attempt_steps(attempt: Mapping[str, Any], *, end_s: float) -> list[Step]:
    context, generation = attempt["context_instance"], attempt["generation_instance"]
    prefill_s = attempt["began_s"] + attempt["reuse_s"] + attempt["prefill_queue_s"]
    prefill_end_s = prefill_s + attempt["prefill_compute_s"]
    found = []
    if attempt["num_pulled_tokens"]:
        name = f"bring {attempt['num_pulled_tokens']} tokens back"
        found.append(Step(name, attempt["reuse_from"], attempt["began_s"], attempt["reuse_s"], "yellow"))
    found.append(Step("prefill", context or generation, prefill_s, attempt["prefill_compute_s"], "green"))
    decode_s = attempt["first_token_s"] or prefill_end_s
    if attempt["transfer_bytes"]:
        landed_s = prefill_end_s + attempt["exposed_s"]
        mebibytes = attempt["transfer_bytes"] / 2**20
        name = f"KV transfer, {mebibytes:.1f} MiB"
        begin_s = max(attempt["began_s"], landed_s - attempt["transfer_s"])
        hidden = attempt["hidden_bytes"] / attempt["transfer_bytes"]
        where = f"{attempt['transport']}, {hidden:.0%} hidden"
        found.append(Step(name, where, begin_s, attempt["transfer_s"], "yellow"))
        decode_s = landed_s
    if generation:
        name = f"decode, {attempt['num_tokens']} tokens"
        found.append(Step(name, generation, decode_s, max(0.0, end_s - decode_s), "magenta"))
    return found


def waterfall(story: Mapping[str, Any]) -> Table:
    total_s = max(story["e2e_s"], 1e-9)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), show_header=False)
    for _ in range(4):
        table.add_column(no_wrap=True)
    for step in steps(story):
        table.add_row(step.name, _short(step.where), _milliseconds(step.duration_s), _bar(step, total_s))
    table.add_row("", "", "", "")
    table.add_row("first token", "", _milliseconds(story["ttft_s"] or 0.0), "")
    if story["tpot_s"]:
        table.add_row("each later token", "mean", _milliseconds(story["tpot_s"]), "")
    table.add_row(
        "all", f"{story['num_prompt_tokens']} tokens in, {story['num_tokens']} out", _milliseconds(total_s), ""
    )
    return table


def _bar(step: Step, total_s: float) -> Text:
    begin = min(round(step.begin_s / total_s * BAR_WIDTH), BAR_WIDTH - 1)
    length = max(1, round(step.duration_s / total_s * BAR_WIDTH))
    return Text(" " * begin + "━" * min(length, BAR_WIDTH - begin), style=step.color)


def _short(instance: str) -> str:
    """`generation-4711` of `generation-4711-5b3e01`: role and process; what follows only makes it unique for ever."""
    return "-".join(instance.split("-")[:2])


def _milliseconds(seconds: float) -> Text:
    return Text(f"{seconds * 1000:,.1f} ms", justify="right")


def candidates(attempt: Mapping[str, Any]) -> Table:
    """Who else could have taken one attempt, and what that was thought to cost; the chosen one first.

    Fits into 80 columns: units are in the title, and headings are short.
    """
    told = attempt["decision"]
    title = f"{attempt['why']}; cached tokens predicted: {told['predicted_cached_tokens']}, "
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), title_justify="left")
    table.title = title + f"found: {attempt['num_cached_tokens'] - attempt['num_pulled_tokens']}; times in ms"
    parts = [name for name in (told["candidates"] or [{}])[0] if name not in ("context", "generation", "score")]
    for name in ("context", "generation", "score", *parts):
        table.add_column(name.removesuffix("_s").removeprefix("num_").removesuffix("_tokens"), no_wrap=True)
    for scored in told["candidates"]:
        row = [_short(scored["context"]), _short(scored["generation"]), f"{scored['score']:.4g}"]
        table.add_row(*row, *(_part(name, scored[name]) for name in parts))
    return table


def _part(name: str, value: float) -> str:
    return f"{1000 * value:,.1f}" if name.endswith("_s") else f"{value:g}"
