"""Streams whose tokens go from a decode step to their clients' connections without a line of Python for each.

A stream has a lane while its tokens come one by one and each is text by itself, told in an event that differs from the
last one in nothing else, to a client that keeps up. That is nearly every token of nearly every stream. The lane keeps
its own short books (which tokens went out, when the last one did); its owner takes them over now and then, and before
anything else happens to the stream. What a lane does not take, its owner gets as if there were none.
"""

from __future__ import annotations

import ctypes
import weakref
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple, Protocol

from orchestrator.fan_out.library import EVENT_MAX, PENDING_MAX, library


class Outlet(Protocol):
    def write_rest(self, rest: bytes) -> None:
        """What the kernel did not take of an event."""


class Terminal(NamedTuple):
    """Where a stream's events go, and what stands around their text."""

    descriptor: int
    """Of a socket that does not block. It must not be closed before the lane is."""
    before: bytes
    after: bytes
    """With the CRLF of a chunk, where it is chunked."""
    is_chunked: bool
    known: Mapping[int, bytes]
    """Text of tokens, in JSON. It may grow; what is in it stays as it is."""
    outlet: Outlet
    on_lane: Callable[[Lane], object]
    """Told of the lane, once, so that it can shut it when the client does not keep up."""
    flush: Callable[[], None]
    """Writes whatever else waits to be written to any terminal: called before a step's events are."""


class Lane:
    """Of one stream, from `FanOut.open` to `close`."""

    __slots__ = ("_fan_out", "_known", "_stream_key", "address")

    def __init__(self, fan_out: FanOut, stream_key: int, address: int, known: Mapping[int, bytes]) -> None:
        self._fan_out = fan_out
        self._known = known
        self._stream_key = stream_key
        self.address = address
        """Of its native form; 0: it is closed."""

    def go_on(self, position: int, last_position: int, last_token_s: float, longest_gap_s: float) -> None:
        """Take the tokens from `position` on, but not the one at `last_position`."""
        self._fan_out.native.go_on(self.address, position, last_position, last_token_s, longest_gap_s)

    def shut(self) -> None:
        """Take none until `go_on`. Of a closed one: nothing."""
        if self.address:
            self._fan_out.native.shut(self.address)

    def take(self) -> tuple[Sequence[int], float, float]:
        """The tokens that went out since the last call, when the last one did, and the longest gap before one."""
        return self._fan_out.tokens_of(self.address)

    def learn(self, token_id: int) -> None:
        """It was not taken; next time it can be, if its text is known by now."""
        self._fan_out.learn(self._known, token_id)

    def close(self) -> None:
        """What was not taken over is lost. Nothing may be asked of it any more but to `shut`."""
        address, self.address = self.address, 0
        self._fan_out.closed(self._stream_key, address)


class FanOut:
    """All lanes of one event loop. Owns what they have in native memory."""

    def __init__(self, native: ctypes.CDLL) -> None:
        self.native: Final = native
        self._address: int = native.make_fan_out()
        if not self._address:
            raise MemoryError("no memory for a fan-out")
        self._lanes: dict[int, tuple[Lane, Outlet]] = {}
        """By stream key."""
        self._spellings: dict[int, tuple[Mapping[int, bytes], int]] = {}
        """By the identity of a mapping of texts: that mapping, and its native form. One for each tokenizer."""
        self._flush: Callable[[], None] = _nothing
        self._token_ids = (ctypes.c_uint32 * PENDING_MAX)()
        self._times = (ctypes.c_double * 2)()
        self._rest = ctypes.create_string_buffer(EVENT_MAX)
        weakref.finalize(self, _free, native, self._address, self._spellings)

    @classmethod
    def make(cls) -> FanOut | None:
        """None, with the reason logged, where there is no native code."""
        native = library()
        return None if native is None else cls(native)

    def open(self, stream_key: int, terminal: Terminal) -> Lane | None:
        """A lane that takes nothing before `go_on`. None: its events are too long for one."""
        before, after = terminal.before, terminal.after
        texts = self._texts_of(terminal.known)
        around = before, len(before), after, len(after), terminal.is_chunked
        address = self.native.open_lane(self._address, stream_key, terminal.descriptor, texts, *around)
        if not address:
            return None
        self._flush = terminal.flush
        lane = Lane(self, stream_key, address, terminal.known)
        self._lanes[stream_key] = lane, terminal.outlet
        terminal.on_lane(lane)
        return lane

    def closed(self, stream_key: int, address: int) -> None:
        del self._lanes[stream_key]
        self.native.close_lane(self._address, address)

    def deliver(
        self, stream_keys: Sequence[int], positions: Sequence[int], token_ids: Sequence[int], now_s: float
    ) -> Sequence[int]:
        """Write a step's tokens, which stand in columns, each to the client of its stream; the indices of those that no
        lane took, in order."""
        count = len(stream_keys)
        if not self._lanes:
            return range(count)
        self._flush()
        # ctypes takes the addresses; the arrays live until the call returns.
        keys, places, ids, left = array("Q", stream_keys), array("I", positions), array("I", token_ids), array("q")
        left.frombytes(bytes(8 * count))
        columns = keys.buffer_info()[0], places.buffer_info()[0], ids.buffer_info()[0]
        num_left = self.native.deliver(self._address, *columns, count, now_s, left.buffer_info()[0])
        if not num_left:
            return ()
        del left[num_left:]
        for index in left:
            if index < 0:
                self._write_rest(*self._lanes[keys[-1 - index]])
        return [index for index in left if index >= 0]

    def _write_rest(self, lane: Lane, outlet: Outlet) -> None:
        """The kernel took a part of an event: its connection writes the other part when it can."""
        num_bytes = self.native.take_rest(lane.address, self._rest)
        outlet.write_rest(self._rest.raw[:num_bytes])

    def tokens_of(self, address: int) -> tuple[Sequence[int], float, float]:
        num_tokens = self.native.take_tokens(address, self._token_ids, self._times)
        return self._token_ids[:num_tokens], self._times[0], self._times[1]

    def learn(self, known: Mapping[int, bytes], token_id: int) -> None:
        if text := known.get(token_id):
            self.native.learn(self._texts_of(known), token_id, text, len(text))

    def _texts_of(self, known: Mapping[int, bytes]) -> int:
        found = self._spellings.get(id(known))
        if found is None:
            address: int = self.native.make_spellings()
            if not address:
                raise MemoryError("no memory for the texts of tokens")
            found = self._spellings[id(known)] = known, address
            ids, lengths = array("I", known), array("I", map(len, known.values()))
            columns = ids.buffer_info()[0], lengths.buffer_info()[0]
            self.native.learn_all(address, *columns, b"".join(known.values()), len(ids))
        return found[1]


def _nothing() -> None:
    """Nobody has anything to write yet."""


def _free(native: ctypes.CDLL, fan_out: int, spellings: Mapping[int, tuple[Mapping[int, bytes], int]]) -> None:
    native.free_fan_out(fan_out)
    for _, texts in spellings.values():
        native.free_spellings(texts)
