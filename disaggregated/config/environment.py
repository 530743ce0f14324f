"""Environment variables that override keys of a deployment file, by one rule.

`DISAGG__` and the key's path, in capitals, with `__` where the file goes one section deeper:

    DISAGG__PORT=9000                                             port
    DISAGG__GENERATION_SERVERS__MAX_BATCH_SIZE=8                  generation_servers.max_batch_size
    DISAGG__CONTEXT_SERVERS__KV_CACHE_CONFIG__TOKENS_PER_BLOCK=64

The value is read as YAML. A few names that users of other servers have in their scripts stand for such a variable.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import yaml

from disaggregated.errors import ConfigError

PREFIX: Final = "DISAGG__"

KNOWN_NAMES: Final[Mapping[str, str]] = {
    "VLLM_MODEL": "model",
    "VLLM_DTYPE": "dtype",
    "VLLM_TENSOR_PARALLEL_SIZE": "tensor_parallel_size",
    "VLLM_GPU_MEMORY_UTIL": "free_gpu_memory_fraction",
    "VLLM_TRUST_REMOTE_CODE": "trust_remote_code",
}
"""Taken as the `DISAGG__` variable of that key; where both are set, the `DISAGG__` one counts."""

SWITCHES: Final[Mapping[str, tuple[str, str]]] = {
    f"TRTLLM_USE_{name}_KVCACHE": ("cache_transceiver_config.backend", name) for name in ("UCX", "NIXL", "MPI")
}
"""Set to 1, taken as the `DISAGG__` variable of that key with that value."""

OTHER_NAMES: Final[Mapping[str, str]] = {
    "TLLM_DISABLE_MPI": "no effect: MPI is used where cache_transceiver_config.backend says MPI, and nowhere else",
}


def overrides(environ: Mapping[str, str]) -> dict[str, tuple[str, object]]:
    """Path of a key -> (the variable that sets it, its value read as YAML)."""
    found: dict[str, tuple[str, object]] = {}
    for name, path in KNOWN_NAMES.items():
        if environ.get(name):
            found[path] = (name, _value(name, environ[name]))
    for name, path, value in switched(environ):
        found[path] = (name, value)
    for name in sorted(environ):
        path = ".".join(part.lower() for part in name.removeprefix(PREFIX).split("__"))
        if name.startswith(PREFIX):
            found[path] = (name, _value(name, environ[name]))
    return found


def switched(environ: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """The switches that are set: the variable, the key, its value. A server that is started alone reads these, too."""
    return [(name, path, value) for name, (path, value) in SWITCHES.items() if environ.get(name) == "1"]


def override(document: Mapping[str, object], at: str, value: object) -> dict[str, Any]:
    """A copy of `document` with the key at the dotted path `at` set; sections on the way are made."""
    first, dot, rest = at.partition(".")
    below = document.get(first)
    inner = override(below if isinstance(below, dict) else {}, rest, value) if dot else value
    return {**document, first: inner}


def remarks(environ: Mapping[str, str]) -> list[str]:
    """A line for each variable that asks for something that has no effect here."""
    return [f"{name}: {says}" for name, says in OTHER_NAMES.items() if environ.get(name)]


def _value(name: str, text: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: is not a YAML value: {text!r}") from error
