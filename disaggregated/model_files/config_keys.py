"""Reading config.json key by key: each reader checks the type, and complains with file and key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from disaggregated.errors import ModelUnavailable
from disaggregated.model_files.checkpoint import read_json

DTYPES: Final = ("float32", "bfloat16", "float16")
_NEEDED_BY_ROPE_TYPE: Final[Mapping[str, tuple[str, ...]]] = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
_TAKEN_BY_ROPE_TYPE: Final[Mapping[str, tuple[str, ...]]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
}
"""Numbers that may be missing or null."""

Rope = tuple[float, Mapping[str, Any] | None]
"""Theta, and the scaling if there is any, with its `rope_type` and its numbers under Hugging Face's names."""


class Keys:
    """The keys of one JSON file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._values = read_json(file)

    def bad(self, key: str, must: str) -> ModelUnavailable:
        found = f"is {self._values[key]!r}" if key in self._values else "is missing"
        return ModelUnavailable(f"{self._file}: {key}: {must}, {found}")

    def get(self, key: str) -> Any:
        return self._values.get(key)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def positive_int(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not _is_int(value) or value < 1:
            raise self.bad(key, "must be a positive whole number")
        return int(value)

    def natural(self, key: str, default: int) -> int:
        """Zero or more."""
        value = self.get(key)
        if value is None:
            return default
        if not _is_int(value) or value < 0:
            raise self.bad(key, "must be a whole number, 0 or more")
        return int(value)

    def optional_int(self, key: str, absent: int | None = None) -> int | None:
        """A positive number, or None where the file says null; `absent` where it says nothing."""
        if key not in self:
            return absent
        return None if self.get(key) is None else self.positive_int(key)

    def number(self, key: str, default: float) -> float:
        value = self.get(key)
        if value is None:
            return default
        if not _is_positive(value):
            raise self.bad(key, "must be a positive number")
        return float(value)

    def optional_number(self, key: str, absent: float | None) -> float | None:
        """As `optional_int`."""
        if key not in self:
            return absent
        return None if self.get(key) is None else self.number(key, 0.0)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.bad(key, "must be true or false")
        return value

    def choice(self, key: str, choices: Sequence[str], default: str) -> str:
        value = default if self.get(key) is None else self.get(key)
        if value not in choices:
            raise self.bad(key, f"must be {' or '.join(choices)}")
        return str(value)

    def token(self, key: str) -> int | None:
        value = self.get(key)
        if value is not None and not _is_int(value):
            raise self.bad(key, "must be a token id or null")
        return None if value is None else int(value)

    def ints(self, key: str) -> tuple[int, ...]:
        value = self.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(_is_int(item) for item in value):
            raise self.bad(key, "must be a list of whole numbers")
        return tuple(value)

    def dtype(self) -> str:
        key = "dtype" if self.get("dtype") is not None else "torch_dtype"
        dtype = self.get(key)
        if dtype is None:
            return "float32"
        if dtype not in DTYPES:
            raise self.bad(key, f"must be one of {', '.join(DTYPES)}")
        return str(dtype)

    def rope(self, default_theta: float = 10000.0, layer_type: str | None = None) -> Rope:
        """Newer files have theta and scaling in `rope_parameters`, older ones theta outside and `rope_scaling`.

        `layer_type`: of a file that has parameters for each type of layer, whose are wanted.
        """
        key = "rope_parameters" if self.get("rope_parameters") is not None else "rope_scaling"
        rope = self.get(key)
        theta = self.number("rope_theta", default_theta)
        if rope is None:
            return theta, None
        if isinstance(rope, dict) and layer_type is not None and isinstance(rope.get(layer_type), dict):
            rope = rope[layer_type]
        if not isinstance(rope, dict):
            raise self.bad(key, "must be an object")
        theta = rope.get("rope_theta", theta)
        if not _is_positive(theta):
            raise self.bad(key, "rope_theta must be a positive number")
        return float(theta), self._rope_scaling(key, rope)

    def _rope_scaling(self, key: str, rope: Mapping[str, Any]) -> Mapping[str, Any] | None:
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "default":
            return None
        if not isinstance(kind, str) or kind not in _NEEDED_BY_ROPE_TYPE:
            known = " or ".join(_NEEDED_BY_ROPE_TYPE)
            raise self.bad(key, f"rope_type must be default, {known} (others are not supported)")
        needed = _NEEDED_BY_ROPE_TYPE[kind]
        if "original_max_position_embeddings" in needed:
            rope = {"original_max_position_embeddings": self.get("max_position_embeddings"), **rope}
        taken = [name for name in _TAKEN_BY_ROPE_TYPE.get(kind, ()) if rope.get(name) is not None]
        for name in (*needed, *taken):
            if not _is_positive(rope.get(name)) and not (name in taken and rope[name] == 0):
                raise self.bad(key, f"{name} must be a positive number")
        if rope.get("truncate", True) is not True:
            raise self.bad(key, "truncate must be true (its other form is not supported)")
        return {"rope_type": kind, **{name: rope[name] for name in (*needed, *taken)}}


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
