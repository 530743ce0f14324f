"""How far a forward pass has come, for those who can begin with its first layers while it computes the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class LayerProgress:
    """Somebody who wants to know, while a pass is made, how many layers' keys and values lie in their pools."""

    every: int
    """Layers between two calls of `written`."""
    written: Callable[[int], None]
    """Called with a growing number, at last with that of all layers. What it does, the pass waits for."""


def layer_ranges(num_layers: int, progress: LayerProgress | None) -> Sequence[tuple[int, int]]:
    """(first, end) of the layers to compute between two calls of `written`; all in one when nobody wants to know."""
    every = num_layers if progress is None else progress.every
    return [(first, min(first + every, num_layers)) for first in range(0, num_layers, every)]
