"""The cluster's secret: what every process of one deployment knows, and nobody else.

It is used only to derive keys, each for one purpose, and never travels between processes that run already. A process
gets it from a file (`cluster_secret_file`), or from its environment, where the launcher puts it for the servers that it
starts: never from the command line, which everybody on the machine can read.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Mapping, MutableMapping
from typing import Final

from disaggregated.errors import ConfigError

VARIABLE: Final = "DISAGG_CLUSTER_SECRET"
FILE_KEY: Final = "cluster_secret_file"
CHARACTERS_MIN: Final = 32
"""Of hexadecimal digits that is 128 bits."""
CHARACTERS_MAX: Final = 4096
HOW_TO_MAKE_ONE: Final = "openssl rand -hex 32"
_OTHERS: Final = stat.S_IRWXO | stat.S_IWGRP | stat.S_IXGRP
"""A group may read the file, since that is how containers are handed one; nobody else may do anything with it."""


class ClusterSecret:
    """Is not shown by `repr`, hence in no log and no traceback.

    Without one (`OPEN`) the same handshakes are done with keys that anybody can derive: they tell mistakes apart, and
    keep nobody out.
    """

    __slots__ = ("_key", "_text")

    def __init__(self, text: str) -> None:
        """Raises ConfigError when `text` is too short to be a secret."""
        if text and not CHARACTERS_MIN <= len(text) <= CHARACTERS_MAX:
            raise ConfigError(
                f"the cluster's secret has {len(text)} characters, {CHARACTERS_MIN} to {CHARACTERS_MAX} are allowed; "
                f"{HOW_TO_MAKE_ONE} makes one"
            )
        self._text = text
        self._key = hashlib.sha256(b"disaggregated cluster secret\0" + text.encode()).digest()

    @classmethod
    def random(cls) -> ClusterSecret:
        return cls(secrets.token_hex(32))

    @property
    def is_open(self) -> bool:
        """There is none: whoever reaches a port is served."""
        return not self._text

    def derive(self, purpose: str, *parts: bytes) -> bytes:
        """A key of 32 bytes for one purpose and these parts; tells nothing about any other, nor about the secret."""
        return mac(self._key, purpose, *parts)

    def for_child(self) -> dict[str, str]:
        """What to add to the environment of a server that we start; only its user and root can read it there."""
        return {} if self.is_open else {VARIABLE: self._text}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClusterSecret) and hmac.compare_digest(self._key, other._key)

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"ClusterSecret({'open' if self.is_open else '...'})"

    def __reduce__(self) -> str:
        raise TypeError("the cluster's secret is not written anywhere")


OPEN: Final = ClusterSecret("")


def mac(key: bytes, purpose: str, *parts: bytes) -> bytes:
    """HMAC-SHA256 over `purpose` and `parts`. Each goes with its length: no two lists of parts are the same bytes."""
    message = bytearray()
    for part in (purpose.encode(), *parts):
        message += len(part).to_bytes(8, "little")
        message += part
    return hmac.digest(key, message, "sha256")


def same(one: bytes, other: bytes) -> bool:
    """Takes as long for bytes that differ early as for bytes that differ late."""
    return hmac.compare_digest(one, other)


def find(environ: Mapping[str, str], *, file: str = "", key: str = "") -> ClusterSecret:
    """The secret that this process was given, or `OPEN`.

    `file` is the configured `cluster_secret_file`; `key` a secret that stands in the configuration file itself.

    Raises ConfigError, naming the place: for a file that is missing or that others can read, for a secret that is too
    short, and for two places that do not agree.
    """
    places = {
        FILE_KEY: read_file(file) if file else OPEN,
        "internal_request_auth_key": _named("internal_request_auth_key", key),
        VARIABLE: _named(VARIABLE, environ.get(VARIABLE, "").strip()),
    }
    given = {name: secret for name, secret in places.items() if not secret.is_open}
    if len(set(given.values())) > 1:
        raise ConfigError(f"{' and '.join(given)} hold different secrets; leave one of them out")
    return next(iter(given.values()), OPEN)


def forget(environ: MutableMapping[str, str]) -> None:
    """Take the secret out of our own environment, so that no process we start inherits it unasked."""
    environ.pop(VARIABLE, None)


def read_file(path: str) -> ClusterSecret:
    """Raises ConfigError, in words, for a file that cannot hold a secret."""
    try:
        with open(path, encoding="utf-8") as file:
            status = os.fstat(file.fileno())
            text = file.read(CHARACTERS_MAX + 2).strip()
    except OSError as error:
        raise ConfigError(f"{FILE_KEY}: {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{FILE_KEY}: {path}: is not text; {HOW_TO_MAKE_ONE} makes a secret") from error
    if reason := _why_not_private(status):
        raise ConfigError(f"{FILE_KEY}: {path}: {reason}; chmod 600 {path}")
    if not text:
        raise ConfigError(f"{FILE_KEY}: {path}: is empty; {HOW_TO_MAKE_ONE} makes a secret")
    return _named(f"{FILE_KEY}: {path}", text)


def _why_not_private(status: os.stat_result) -> str | None:
    if not stat.S_ISREG(status.st_mode):
        return "is not a file"
    if status.st_uid not in (os.getuid(), 0):
        return f"belongs to user {status.st_uid}, who could change it"
    if status.st_mode & _OTHERS:
        return f"others than its owner may use it (mode {stat.S_IMODE(status.st_mode):o})"
    return None


def _named(place: str, text: str) -> ClusterSecret:
    try:
        return ClusterSecret(text)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None
