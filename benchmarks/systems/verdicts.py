"""From raw figures to the report: a table of all systems, and what we promise as ratios between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from benchmarks.report import Row
from benchmarks.systems.results import Results

TITLES: Final = {
    "ours-fp32": "**ours, 1 + 1 cores, fp32**",
    "ours-int8": "**ours, 1 + 1 cores, int8**",
    "balanced-fp32": "**ours, 1 + 1 cores, balanced, fp32**",
    "balanced-int8": "**ours, 1 + 1 cores, balanced, int8**",
    "mixed-fp32": "**ours, mixed, fp32**",
    "mixed-int8": "**ours, mixed, int8**",
    "vllm": "vLLM CPU 0.32, fp32",
    "vllm-nixl": "vLLM CPU 0.32, NIXL 1 + 1 cores, fp32",
    "llama-f32": "llama.cpp server, f32",
    "llama-q8_0": "llama.cpp server, Q8_0",
    "transformers": "transformers `generate`, static batch, fp32",
}
PEERS: Final = ("vllm", "vllm-nixl", "llama-f32", "llama-q8_0")
AGGREGATED: Final = ("vllm", "llama-f32", "llama-q8_0")


def table(results: Results) -> str:
    """Markdown; a dash where nothing was measured."""
    lines = [
        "| system | a: TTFT, ITL ms | b: output tok/s | TTFT p50 ms | ITL p50, p99 ms "
        "| c: ITL p99 quiet → with long prompts, ms | ratio | worst gap ms | long prompt's TTFT s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for system, title in TITLES.items():
        cells = [*_cells_a(results, system), *_cells_b(results, system), *_cells_c(results, system)]
        if any(cell != "–" for cell in cells):
            lines.append(f"| {title} | {' | '.join(cells)} |")
    failures = [
        f"- {TITLES[system]}, load {load}: {failure}"
        for system in TITLES
        for load in "abc"
        if (failure := results.failure(system, load))
    ]
    return "\n".join([*lines, *(["", "Failed:", *failures] if failures else [])])


def _cells_a(results: Results, system: str) -> list[str]:
    part = results.get(system, "a")
    return ["–"] if part is None else [f"{part['ttft_p50_ms']:.0f}, {part['itl_p50_ms']:.1f}"]


def _cells_b(results: Results, system: str) -> list[str]:
    part = results.get(system, "b")
    if part is None:
        return ["–"] * 3
    cells = [f"{part['output_tokens_per_s']:.1f}"]
    if "ttft_p50_ms" not in part:
        return [*cells, "–", "–"]
    return [*cells, f"{part['ttft_p50_ms']:.0f}", f"{part['itl_p50_ms']:.0f}, {part['itl_p99_ms']:.0f}"]


def _cells_c(results: Results, system: str) -> list[str]:
    part = results.get(system, "c")
    if part is None:
        return ["–"] * 4
    quiet, loud = part["quiet_itl_p99_ms"], part["itl_p99_ms"]
    ratio, ttft_s = loud / quiet, part["long_prompt_ttft_p50_ms"] / 1e3
    return [f"{quiet:.0f} → {loud:.0f}", f"{ratio:.2f}", f"{part['itl_max_ms']:.0f}", f"{ttft_s:.1f}"]


def rows(results: Results) -> list[Row]:
    """One for each promise of which both sides were measured."""
    found = [
        _at_least(results, "ours-fp32", "vllm", 1.25),
        _at_least(results, "ours-int8", "vllm", 2.5),
        _at_least(results, "ours-fp32", "vllm-nixl", 4.0),
        _at_least(results, "balanced-fp32", "vllm", 1.25),
        _at_least(results, "balanced-int8", "vllm", 2.5),
        _below_all(results, "ours-fp32", "ttft_p50_ms", "TTFT p50"),
        _below_all(results, "ours-fp32", "itl_p50_ms", "ITL p50"),
        _below_all(results, "ours-int8", "ttft_p50_ms", "TTFT p50"),
        _below_all(results, "ours-int8", "itl_p50_ms", "ITL p50"),
        *(_undisturbed(results, system) for system in ("ours-fp32", "ours-int8")),
        *(_steadier(results, system, "itl_p99_ms", "ITL p99") for system in ("ours-fp32", "ours-int8")),
        *(_steadier(results, system, "itl_max_ms", "longest gap") for system in ("ours-fp32", "ours-int8")),
    ]
    return [row for row in found if row is not None]


def _at_least(results: Results, ours: str, peer: str, bar: float) -> Row | None:
    mine, theirs = results.get(ours, "b"), results.get(peer, "b")
    if mine is None or theirs is None:
        return None
    ratio = mine["output_tokens_per_s"] / theirs["output_tokens_per_s"]
    return Row(
        what=f"load b, output tok/s: {_plain(ours)} ÷ {_plain(peer)}",
        seen=f"{ratio:.2f} ({mine['output_tokens_per_s']:.1f} ÷ {theirs['output_tokens_per_s']:.1f})",
        bar=f"at least {bar:g}",
        holds=ratio >= bar,
    )


def _below_all(results: Results, ours: str, field: str, words: str) -> Row | None:
    mine, best = results.get(ours, "b"), _best(results, PEERS, "b", lambda part: part[field])
    if mine is None or best is None:
        return None
    return Row(
        what=f"load b, {words}: {_plain(ours)}, and the best peer ({_plain(best[0])})",
        seen=f"{mine[field]:.0f} ms, {best[1]:.0f} ms",
        bar="below it",
        holds=mine[field] < best[1],
    )


def _undisturbed(results: Results, ours: str) -> Row | None:
    mine = results.get(ours, "c")
    if mine is None:
        return None
    ratio = mine["itl_p99_ms"] / mine["quiet_itl_p99_ms"]
    return Row(
        what=f"load c, decode ITL p99 while long prompts come ÷ quiet: {_plain(ours)}",
        seen=f"{ratio:.2f} ({mine['itl_p99_ms']:.0f} ms, {mine['quiet_itl_p99_ms']:.0f} ms)",
        bar="at most 1.3",
        holds=ratio <= 1.3,
    )


def _steadier(results: Results, ours: str, field: str, words: str) -> Row | None:
    """A stall that hits each stream once in 15 s is in less than one gap of a hundred: the longest gap shows it."""
    mine, best = results.get(ours, "c"), _best(results, AGGREGATED, "c", lambda part: part[field])
    if mine is None or best is None:
        return None
    ratio = best[1] / mine[field]
    return Row(
        what=f"load c, decode, {words}: best aggregated peer ({_plain(best[0])}) ÷ {_plain(ours)}",
        seen=f"{ratio:.1f} ({best[1]:.0f} ms ÷ {mine[field]:.0f} ms)",
        bar="at least 5",
        holds=ratio >= 5,
    )


def _best(
    results: Results, systems: Iterable[str], load: str, figure: Callable[[dict[str, float]], float]
) -> tuple[str, float] | None:
    """The system with the lowest figure."""
    parts: Sequence[tuple[str, dict[str, float]]] = [
        (system, dict(part)) for system in systems if (part := results.get(system, load)) is not None
    ]
    return min(((system, figure(part)) for system, part in parts), key=lambda found: found[1], default=None)


def _plain(system: str) -> str:
    return TITLES[system].strip("*")
