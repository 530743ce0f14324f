"""API keys: a file that names who may ask for what, read at start and again whenever it has changed.

    keys:
      - name: team-a                # in metrics and logs; the key itself is in neither
        key: sk-...                 # or key_sha256: the 64 digits that `printf %s KEY | sha256sum` prints
        models: [my-model]          # left out: all
        requests_per_minute: 600    # left out: no limit
        tokens_per_minute: 200000   # prompts and answers together
        weight: 2                   # of its turns in the queue; left out: 1
        best_priority: 0            # the lowest `priority` that its requests may ask for
        operator: false             # may also scale, and see stories, ledgers and servers

What a client sends is hashed with a key that only this process knows before it is looked up, so that the time of the
lookup tells nothing about the keys that there are; the last comparison takes equally long for whatever differs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from disaggregated.config.kinds import BOOLEAN, TEXT, BadValue, Kind, integer, number
from disaggregated.config.security_keys import SECRET
from disaggregated.config.yaml_file import read_yaml
from disaggregated.errors import ConfigError

FILE_KEY: Final = "api_keys_file"
KEYS_MAX: Final = 10_000
CHARACTERS_MIN: Final = 16
"""Of a key: fewer can be guessed."""
CHARACTERS_MAX: Final = 512
_FILE_BYTES_MAX: Final = 8 << 20
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    name: str
    digest: bytes = dataclasses.field(repr=False)
    """SHA-256 of the key."""
    models: frozenset[str] | None = None
    """None: all."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    weight: float = 1.0
    best_priority: int = 0
    operator: bool = False


class KeyRing:
    """The keys of one reading of the file."""

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        self._blind = secrets.token_bytes(32)
        self._keys = {self._blinded(key.digest): key for key in keys}

    def find(self, presented: str) -> ApiKey | None:
        """Whose key it is. Takes as long for a wrong key that is nearly right as for any other."""
        digest = digest_of(presented[: CHARACTERS_MAX + 1])
        found = self._keys.get(self._blinded(digest))
        return found if found is not None and hmac.compare_digest(found.digest, digest) else None

    def _blinded(self, digest: bytes) -> bytes:
        return hmac.digest(self._blind, digest, "sha256")

    def __len__(self) -> int:
        return len(self._keys)


def digest_of(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="replace")).digest()


def read_keys(path: Path) -> list[ApiKey]:
    """Takes a second for thousands of keys: call it on a thread.

    Raises:
        ConfigError: one line that names the entry and what is wrong with it, and never shows a key.
    """
    _check_size(path)
    document = _read_document(path)
    entries = document.pop("keys", None)
    if document:
        raise ConfigError(f"{FILE_KEY}: {path}: unknown key {next(iter(document))!r}; there is only `keys`")
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{FILE_KEY}: {path}: `keys` must be a list with at least one entry")
    if len(entries) > KEYS_MAX:
        raise ConfigError(f"{FILE_KEY}: {path}: has {len(entries)} keys, the limit is {KEYS_MAX}")
    keys = [_read_entry(f"{FILE_KEY}: {path}: keys[{index}]", entry) for index, entry in enumerate(entries)]
    _check_distinct(path, keys)
    if any("key" in entry for entry in entries):
        _check_private(path)
    return keys


def _read_document(path: Path) -> dict[str, Any]:
    try:
        return read_yaml(path)
    except ConfigError as error:
        raise ConfigError(f"{FILE_KEY}: {error}") from error


def _check_size(path: Path) -> None:
    try:
        size = os.stat(path).st_size
    except OSError as error:
        raise ConfigError(f"{FILE_KEY}: {path}: {error.strerror}") from error
    if size > _FILE_BYTES_MAX:
        raise ConfigError(f"{FILE_KEY}: {path}: has {size} bytes, the limit is {_FILE_BYTES_MAX}")


def _check_private(path: Path) -> None:
    mode = os.stat(path).st_mode
    if mode & stat.S_IRWXO:
        raise ConfigError(
            f"{FILE_KEY}: {path}: others than its owner may read the keys in it (mode {stat.S_IMODE(mode):o}); "
            f"chmod 600 {path}, or write key_sha256 instead of key"
        )


def _check_distinct(path: Path, keys: list[ApiKey]) -> None:
    for what, values in (("name", [key.name for key in keys]), ("key", [key.digest for key in keys])):
        if len(set(values)) < len(values):
            twice = next(index for index, value in enumerate(values) if value in values[:index])
            raise ConfigError(f"{FILE_KEY}: {path}: keys[{twice}].{what}: an earlier entry has the same")


def _check_key(value: object) -> object:
    text = str(SECRET.check(value))
    if not CHARACTERS_MIN <= len(text) <= CHARACTERS_MAX:
        raise BadValue(f"has {len(text)} characters, {CHARACTERS_MIN} to {CHARACTERS_MAX} are allowed")
    return digest_of(text)


def _check_sha256(value: object) -> object:
    text = str(SECRET.check(value)).lower()
    if not _SHA256.fullmatch(text):
        raise BadValue("must be the 64 hexadecimal digits of a SHA-256, in quotes")
    return bytes.fromhex(text)


def _check_models(value: object) -> object:
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise BadValue("must be a list of model names")
    return frozenset(value)


_FIELDS: Final[Mapping[str, tuple[str, Kind]]] = {
    "name": ("name", TEXT),
    "key": ("digest", Kind("a key", _check_key)),
    "key_sha256": ("digest", Kind("a SHA-256", _check_sha256)),
    "models": ("models", Kind("a list of model names", _check_models)),
    "requests_per_minute": ("requests_per_minute", integer(1)),
    "tokens_per_minute": ("tokens_per_minute", integer(1)),
    "weight": ("weight", number(0.001, 1000.0)),
    "best_priority": ("best_priority", integer(-(2**31), 2**31 - 1)),
    "operator": ("operator", BOOLEAN),
}
"""What an entry may hold, and the field that it fills."""


def _read_entry(at: str, entry: object) -> ApiKey:
    if not isinstance(entry, dict):
        raise ConfigError(f"{at}: must be a section of keys")
    fields: dict[str, Any] = {}
    for name, value in entry.items():
        if name not in _FIELDS:
            raise ConfigError(f"{at}: unknown key {name!r}; known are {', '.join(_FIELDS)}")
        field, kind = _FIELDS[name]
        try:
            fields[field] = kind.check(value)
        except BadValue as error:
            raise ConfigError(f"{at}.{name}: {error}") from error
    if "name" not in fields:
        raise ConfigError(f"{at}.name: is missing")
    if ("key" in entry) == ("key_sha256" in entry):
        raise ConfigError(f"{at}: needs one of key and key_sha256")
    return ApiKey(**fields)
