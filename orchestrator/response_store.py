"""The responses that `previous_response_id` may refer to: the latest of them, within a bound of bytes.

Kept as JSON, not as objects: their size is known exactly, and a collection of garbage has nothing to look at.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import Final

import orjson

_TEXTS: Final = ("response", "input_items", "conversation")
_ENTRY_BYTES: Final = 512
"""What an entry costs besides its texts."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StoredResponse:
    response: bytes
    """As its client got it."""
    input_items: bytes
    """The request's own."""
    conversation: bytes
    """Messages from the first to the answer, without instructions: those are each request's own."""
    tenant: str
    """Whose it is; to others it does not exist."""

    def to_json(self) -> bytes:
        """For another worker of the deployment."""
        return orjson.dumps({field: getattr(self, field).decode() for field in _TEXTS} | {"tenant": self.tenant})

    @classmethod
    def from_json(cls, message: bytes) -> StoredResponse:
        fields = orjson.loads(message)
        return cls(**{field: fields[field].encode() for field in _TEXTS}, tenant=fields["tenant"])

    @property
    def num_bytes(self) -> int:
        return len(self.response) + len(self.input_items) + len(self.conversation) + _ENTRY_BYTES


class ResponseStore:
    """Invariant: `num_bytes` is what the entries have together, and at most `bytes_max`; the least recently used one
    goes first."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._entries: OrderedDict[str, StoredResponse] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, response_id: str, stored: StoredResponse) -> None:
        """One that alone is larger than the bound is not kept."""
        assert response_id not in self._entries, "an id was given out twice"
        if stored.num_bytes > self._bytes_max:
            return
        self._entries[response_id] = stored
        self.num_bytes += stored.num_bytes
        while self.num_bytes > self._bytes_max:
            self.num_bytes -= self._entries.popitem(last=False)[1].num_bytes

    def get(self, response_id: str, *, tenant: str) -> StoredResponse | None:
        stored = self._entries.get(response_id)
        if stored is None or stored.tenant != tenant:
            return None
        self._entries.move_to_end(response_id)
        return stored

    def discard(self, response_id: str, *, tenant: str) -> bool:
        """Whether it was there."""
        if self.get(response_id, tenant=tenant) is None:
            return False
        self.num_bytes -= self._entries.pop(response_id).num_bytes
        return True

    def check_integrity(self) -> None:
        assert self.num_bytes == sum(stored.num_bytes for stored in self._entries.values()), "bytes are miscounted"
        assert self.num_bytes <= self._bytes_max, "more is kept than may be"
