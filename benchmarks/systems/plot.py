"""The interference plot as SVG, by hand: one panel a system, time to the right, the longest gap between tokens upwards.

The scale is logarithmic and the same for all; a vertical line is a prompt of 2,048 tokens arriving.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

WIDTH, PANEL_HEIGHT, LEFT, RIGHT, TOP, GAP = 760, 96, 54, 16, 44, 26
DECADES: Final = (10, 100, 1000, 10_000)
"""In ms: the grid, and the ends of the scale."""
OURS, THEIRS, GRID, TEXT, ARRIVAL = "#1f77b4", "#b0413e", "#dddddd", "#333333", "#999999"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    title: str
    is_ours: bool
    part: Mapping[str, Any]
    """A result of load c."""


def write(path: Path, panels: Sequence[Panel]) -> None:
    height = TOP + len(panels) * (PANEL_HEIGHT + GAP) + 24
    end_s = max(panel.part["series"][-1][0] for panel in panels) + 1.0
    shapes = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        f'font-size="11" fill="{TEXT}">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="18" font-size="13">Six chats while prompts of 2,048 tokens arrive: '
        "longest gap between tokens in each half second</text>",
    ]
    for index, panel in enumerate(panels):
        shapes += _panel(panel, TOP + index * (PANEL_HEIGHT + GAP), end_s)
    bottom = TOP + len(panels) * (PANEL_HEIGHT + GAP)
    shapes += [
        f'<text x="{_x(second, end_s):.1f}" y="{bottom}" text-anchor="middle">{second} s</text>'
        for second in range(0, int(end_s) + 1, 10)
    ]
    path.write_text("\n".join([*shapes, "</svg>"]) + "\n")


def _panel(panel: Panel, top: float, end_s: float) -> list[str]:
    shapes = [f'<text x="{LEFT}" y="{top - 5:.1f}" font-weight="bold">{_escaped(panel.title)}</text>']
    for gap_ms in DECADES:
        y = _y(gap_ms, top)
        label = f"{gap_ms} ms" if gap_ms < 1000 else f"{gap_ms // 1000} s"
        shapes.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{GRID}"/>')
        shapes.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for second in panel.part["long_prompts_at_s"]:
        x = _x(second, end_s)
        line = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{top + PANEL_HEIGHT}"'
        shapes.append(f'{line} stroke="{ARRIVAL}" stroke-dasharray="3 3"/>')
    points = " ".join(f"{_x(second, end_s):.1f},{_y(gap_ms, top):.1f}" for second, gap_ms in panel.part["series"])
    colour = OURS if panel.is_ours else THEIRS
    shapes.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
    return shapes


def _x(second: float, end_s: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * second / end_s


def _y(gap_ms: float, top: float) -> float:
    low, high = math.log10(DECADES[0]), math.log10(DECADES[-1])
    share = (math.log10(max(gap_ms, DECADES[0])) - low) / (high - low)
    return top + PANEL_HEIGHT * (1 - min(1.0, share))


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
