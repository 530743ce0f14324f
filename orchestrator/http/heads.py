"""The heads of requests that we read ourselves: a strict and small part of what HTTP/1.1 allows.

There is one regular expression, and every byte of a head that it takes is accounted for: a method and a path that are
ours, lines that end in CR LF, names of token characters right before their colons, values of visible ASCII and spaces.
What else is asked of a head (each name once, one length in digits, nothing that changes the framing) is looked up
afterwards. Whatever is not taken is not an error: another reader gets the same bytes. So two readers cannot differ in
where a request ends: either this one is sure, or it does not read it.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

HEAD_BYTES_MAX: Final = 8000
"""Below aiohttp's limit for one line, so that no head is taken here that it would refuse for its size."""
BODY_BYTES_MAX: Final = 1 << 16
"""A body is kept in memory before anybody has looked at who sends it."""
HEADERS_MAX: Final = 100
LINES_KEPT_MAX: Final = 4096
LINE_KEPT_MAX: Final = 256
"""Characters."""

CHAT_PATH: Final = "/v1/chat/completions"
PATHS: Final = (CHAT_PATH, "/v1/completions")
_HEAD: Final = re.compile(
    rb"POST (/v1/(?:chat/)?completions) HTTP/1\.1\r\n((?:[!#$%&'*+.^_`|~0-9A-Za-z-]++:[ -~]*+\r\n)++)\r\n"
)
_BEGINNINGS: Final = tuple(b"POST %b HTTP/1.1\r\n" % path.encode() for path in PATHS)
_LENGTH: Final = re.compile(r"[0-9]{1,6}")
_REFRAMING: Final = frozenset(
    {"transfer-encoding", "content-encoding", "expect", "upgrade", "trailer", "te", "proxy-connection", "keep-alive"}
)
"""Whatever says more of the connection or the body than the two lines that are read here."""


class Head(NamedTuple):
    path: str
    headers: dict[str, str]
    """By their names in lower case."""
    keep_alive: bool
    num_bytes: int
    """Of the head, with the empty line."""
    body_bytes: int


class _Lines(dict[str, tuple[str, str]]):
    """What lines of heads say, name and value: clients send the same few again and again."""

    def __missing__(self, line: str) -> tuple[str, str]:
        name, _, value = line.partition(":")
        said = name.lower(), value.strip(" ")
        if len(line) <= LINE_KEPT_MAX:
            if len(self) >= LINES_KEPT_MAX:
                self.clear()
            self[line] = said
        return said


_said_by: Final = _Lines().__getitem__


def read_head(received: bytes | bytearray) -> Head | None:
    """The head that `received` begins with; None: it is not all there, or for another reader."""
    found = _HEAD.match(received)
    if found is None or found.end() > HEAD_BYTES_MAX:
        return None
    lines = found[2][:-2].decode("ascii").split("\r\n")
    headers = dict(map(_said_by, lines))
    if len(headers) != len(lines) or len(lines) > HEADERS_MAX or not _REFRAMING.isdisjoint(headers):
        return None
    length = headers.get("content-length", "")
    connection = headers.get("connection", "keep-alive").lower()
    if "host" not in headers or not _LENGTH.fullmatch(length) or connection not in ("keep-alive", "close"):
        return None
    body_bytes = int(length)
    if body_bytes > BODY_BYTES_MAX:
        return None
    return Head(found[1].decode("ascii"), headers, connection == "keep-alive", found.end(), body_bytes)


def may_become_ours(received: bytes | bytearray) -> bool:
    """Whether `received`, of which `read_head` made nothing, could with more bytes become a head that it takes."""
    if len(received) > HEAD_BYTES_MAX or b"\r\n\r\n" in received:
        return False
    return any(received.startswith(whole) or whole.startswith(received) for whole in _BEGINNINGS)
