"""The raw figures: one JSON file that every part of a run is added to, so that a run can go on where it stopped.

{"machine": …, "parts": {"vllm/b": {"commit": …, "date": …, "output_tokens_per_s": 86.4, …}}}
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from benchmarks import report

FILE: Final = report.RESULTS / "systems.json"


class Results:
    def __init__(self, path: Path = FILE) -> None:
        self._path = path
        self._parts: dict[str, dict[str, Any]] = {}
        if path.is_file():
            self._parts = json.loads(path.read_text())["parts"]

    def get(self, system: str, load: str) -> Mapping[str, Any] | None:
        """What was measured last; None where that failed, or was never tried."""
        part = self._parts.get(f"{system}/{load}")
        return None if part is None or "failed" in part else part

    def failure(self, system: str, load: str) -> str:
        return str(self._parts.get(f"{system}/{load}", {}).get("failed", ""))

    def put(self, system: str, load: str, figures: Mapping[str, Any]) -> None:
        """Replaces what was there, and is on disk when this returns."""
        stamp = {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), "commit": report.commit()}
        self._parts[f"{system}/{load}"] = {**stamp, **figures}
        text = json.dumps({"machine": report.machine(), "parts": self._parts}, indent=1, sort_keys=True)
        partial = self._path.with_suffix(".partial")
        partial.write_text(text + "\n")
        partial.replace(self._path)
