"""How a model wants to be sampled where nobody says anything: the sampling keys of its generation_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from disaggregated.errors import ModelUnavailable
from disaggregated.model_files.checkpoint import read_json

_KEYS: Final = ("temperature", "top_p", "top_k", "min_p")


def read_sampling_defaults(folder: Path) -> Mapping[str, float]:
    """Those that the model's directory names. Raises ModelUnavailable if the file is there and damaged."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    found = read_json(path)
    try:
        return {key: float(found[key]) for key in _KEYS if found.get(key) is not None}
    except (ValueError, TypeError) as error:
        raise ModelUnavailable(f"{path} is damaged: {error}") from error
