"""From medians to the lines of the report: what was seen, and whether it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from benchmarks.report import Row
from benchmarks.router.contenders import OURS, SGLANG

Measured = Mapping[tuple[str, str], float]
"""By contender and figure."""

TITLES: Final = {
    "request_us": "CPU a short request, not streamed (8 tokens, 64 clients), µs",
    "request_ids_us": "the same with a prompt of token ids, µs",
    "stream_request_us": "CPU a short request, streamed, µs",
    "token_us": "CPU a streamed token at 64 streams, µs",
    "ttft_ms": "first event at one client, p50, ms",
    "noticed_ms": "a client that hangs up: its request has ended on its server after, worst, ms",
    "not_noticed": "the same: not noticed at all",
    "crowd_errors": "1,000 streams: errors",
    "crowd_ttft_ms": "1,000 streams: first event p50, ms",
    "crowd_token_us": "1,000 streams: CPU a token, all in all, µs",
    "crowd_grown_mb": "1,000 streams: memory grows by, MB",
    "slow_grown_mb": "a client that does not read: memory grows by, MB",
    "slow_noticed_ms": "and hangs up: its request has ended on its server after, ms",
}
RATIOS: Final = {"request_us": 1.0, "request_ids_us": 0.7, "token_us": 0.6, "crowd_ttft_ms": 1.0}
"""Of ours to sglang-router's, at most. What others cannot be asked for is compared with their plain request."""
LIMITS: Final = {
    "ttft_ms": 2.0, "noticed_ms": 100.0, "not_noticed": 0.0, "crowd_errors": 0.0, "crowd_grown_mb": 40.0,
    "slow_grown_mb": 5.0,
}  # fmt: skip


def rows(measured: Measured, names: Sequence[str]) -> list[Row]:
    return [_row(figure, title, measured, names) for figure, title in TITLES.items() if _is_there(figure, measured)]


def _is_there(figure: str, measured: Measured) -> bool:
    return any(found == figure for _, found in measured)


def _row(figure: str, title: str, measured: Measured, names: Sequence[str]) -> Row:
    seen = ", ".join(f"{name} {measured[name, figure]:.4g}" for name in names if (name, figure) in measured)
    ours = measured.get((OURS, figure))
    theirs = measured.get((SGLANG, figure), measured.get((SGLANG, "request_us")))
    if ours is None:
        return Row(what=title, seen=seen)
    if figure in RATIOS and theirs is not None:
        ratio = ours / theirs
        bar = f"≤ {RATIOS[figure]:g} × {SGLANG}"
        return Row(what=title, seen=f"{seen}: {ratio:.2f} ×", bar=bar, holds=ratio <= RATIOS[figure])
    if figure in LIMITS:
        return Row(what=title, seen=seen, bar=f"≤ {LIMITS[figure]:g}", holds=ours <= LIMITS[figure])
    return Row(what=title, seen=seen)
