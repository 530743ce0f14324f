"""Is a converted model in the cache complete? Every start asks, so nothing is imported that this does not need."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from disaggregated.errors import ModelUnavailable
from disaggregated.model_files import safetensors_file

WEIGHTS: Final = "model.safetensors"
TEXT_FILES: Final = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def is_converted(target: Path, *, weights: bool) -> bool:
    """Whether `target` holds everything, undamaged as far as sizes tell. Reads no weights; writes nothing."""
    if not all((target / name).is_file() for name in TEXT_FILES):
        return False
    if not weights:
        return True
    try:
        safetensors_file.check(target / WEIGHTS)
    except ModelUnavailable:
        return False
    return True
