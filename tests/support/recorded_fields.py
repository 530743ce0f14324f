"""Fields that note how they are read: what a body may have, as the code that checks it sees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.api.fields import Fields


class RecordedFields(Fields):
    """`read` has each name, with the JSON type and limits that it was read with; None where it was only looked at."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.read: dict[str, dict[str, Any] | None] = {}

    def get(self, name: str, default: Any = None) -> Any:
        self.read.setdefault(name, None)
        return super().get(name, default)

    def integer(self, name: str, *, low: int, high: int) -> int | None:
        self.read[name] = {"type": ["integer", "null"], "minimum": low, "maximum": high}
        return super().integer(name, low=low, high=high)

    def number(self, name: str, *, low: float, high: float) -> float | None:
        self.read[name] = {"type": ["number", "null"], "minimum": low, "maximum": high}
        return super().number(name, low=low, high=high)

    def flag(self, name: str, *, default: bool = False) -> bool:
        self.read[name] = {"type": ["boolean", "null"], "default": default}
        return super().flag(name, default=default)

    def text(self, name: str) -> str | None:
        self.read[name] = {"type": ["string", "null"]}
        return super().text(name)

    def mapping(self, name: str) -> Mapping[str, Any] | None:
        self.read[name] = {"type": ["object", "null"]}
        return super().mapping(name)
