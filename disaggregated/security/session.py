"""How a caller proves on each gRPC call that it knows the cluster's secret, without clocks and without sending it.

    caller                                                 server
    Greet, once a channel: n_c, fresh             ──▶
                                   ◀──  boot, number of the session, HMAC(greeting key, n_c, boot, number)
    each call, in its metadata: boot, number, count, n_c,
        MAC(session key, count, method)           ──▶      before a handler is looked for, or a byte of the message read

    session key = HMAC(cluster secret, "grpc session", n_c, boot, number)

`boot` is fresh for each server process, so nothing that was recorded before it started is of use; `count` grows with
each call, and the server remembers which of the latest ones it has seen, so nothing is of use twice. It needs no clock:
two hosts whose clocks differ by a day understand each other. A stream is proven when it opens, not with each message.
The caller knows, too, before its first call, that the server knows the secret.

What this does not do: messages are neither encrypted nor signed. Against someone who can change packets on the way
there is TLS.
"""

from __future__ import annotations

import collections
import secrets
import struct
from hashlib import blake2b
from typing import Final, Self

from disaggregated.errors import ServerLost, Unauthenticated
from disaggregated.security.secret import FILE_KEY, VARIABLE, ClusterSecret, same

NONCE_BYTES: Final = 16
SESSIONS_MAX: Final = 4096
"""That a server remembers: one for each channel that was used lately. The one that was silent for longest makes way."""
WINDOW: Final = 1024
"""Calls that may overtake each other; one that is later than that is refused."""
_BOOT_BYTES: Final = 8
_TAG_BYTES: Final = 16
_WELCOME: Final = struct.Struct(f"<{_BOOT_BYTES}sQ32s")
_PROOF: Final = struct.Struct(f"<{_BOOT_BYTES}sQQ{NONCE_BYTES}s{_TAG_BYTES}s")

HOW_TO_JOIN: Final = f"give both processes the same cluster secret ({FILE_KEY}, or the environment variable {VARIABLE})"


class CallerSession:
    """A caller's side of one session. Signs any number of calls."""

    def __init__(self, key: bytes, *, boot: bytes, number: int, nonce: bytes) -> None:
        self._key = key
        self._place = (boot, number)
        self._nonce = nonce
        self._count = 0

    @classmethod
    def from_welcome(cls, secret: ClusterSecret, nonce: bytes, welcome: bytes, *, address: str) -> Self:
        """Raises Unauthenticated when what answers at `address` does not know our secret."""
        if not welcome:
            raise Unauthenticated(f"{address} has no cluster secret, and we have one: {HOW_TO_JOIN}")
        if len(welcome) != _WELCOME.size:
            raise Unauthenticated(f"what answers at {address} is no server of ours")
        boot, number, proof = _WELCOME.unpack(welcome)
        if not same(_greeting_proof(secret, nonce, boot, number), proof):
            raise Unauthenticated(f"{address} has another cluster secret than we: {HOW_TO_JOIN}")
        return cls(_session_key(secret, nonce, boot, number), boot=boot, number=number, nonce=nonce)

    def sign(self, method: bytes) -> bytes:
        """What goes with the next call of `method`, once."""
        self._count += 1
        return _PROOF.pack(*self._place, self._count, self._nonce, _tag(self._key, self._count, method))


class _ServerSession:
    """Invariant: bit i of `_seen` tells whether call number `_latest - i` has come."""

    __slots__ = ("_latest", "_seen", "key")

    def __init__(self, key: bytes) -> None:
        self.key = key
        self._latest = 0
        self._seen = 0

    def take(self, count: int) -> bool:
        """False for a call that came before, or that is too old to know."""
        behind = self._latest - count
        if behind < 0:
            self._seen = ((self._seen << min(-behind, WINDOW)) | 1) & ((1 << WINDOW) - 1)
            self._latest = count
            return True
        if behind >= WINDOW or self._seen >> behind & 1:
            return False
        self._seen |= 1 << behind
        return True


class ServerSessions:
    """A server's side: who may call. Nothing is kept for callers who have proven nothing.

    Invariants: at most `sessions_max` sessions are kept; the numbers up to `_forgotten` that are not among them, and
    those that were never given out, are of no use any more.
    """

    def __init__(self, secret: ClusterSecret, *, sessions_max: int = SESSIONS_MAX) -> None:
        self._secret = secret
        self._sessions_max = sessions_max
        self._boot = secrets.token_bytes(_BOOT_BYTES)
        self._num_given = 0
        self._forgotten = 0
        self._live: collections.OrderedDict[int, _ServerSession] = collections.OrderedDict()
        """By number; the one that called last is last."""

    def __len__(self) -> int:
        return len(self._live)

    def greet(self, nonce: bytes) -> bytes:
        """The answer to a Greet. Costs no memory, however often it is called. A bad nonce is Unauthenticated."""
        if len(nonce) != NONCE_BYTES:
            raise Unauthenticated(f"a greeting has a nonce of {NONCE_BYTES} bytes, not {len(nonce)}")
        self._num_given += 1
        proof = _greeting_proof(self._secret, nonce, self._boot, self._num_given)
        return _WELCOME.pack(self._boot, self._num_given, proof)

    def check(self, proof: bytes | None, method: bytes) -> None:
        """Returns when this call may be served; once for each proof.

        Raises:
            Unauthenticated: the caller does not know the secret, or repeats what it has heard.
            ServerLost: its session was with another process at this address, or is forgotten; it begins anew.
        """
        if proof is None or len(proof) != _PROOF.size:
            raise Unauthenticated(f"this server serves its own cluster only: {HOW_TO_JOIN}")
        boot, number, count, nonce, tag = _PROOF.unpack(proof)
        session = self._live.get(number)
        is_known = session is not None
        if boot != self._boot or (not is_known and not self._forgotten < number <= self._num_given):
            raise ServerLost("this server does not know the session (any more); it may have started again")
        if session is None:
            session = _ServerSession(_session_key(self._secret, nonce, boot, number))
        if not same(_tag(session.key, count, method), tag):
            raise Unauthenticated(f"the proof of this call is wrong: {HOW_TO_JOIN}")
        if not session.take(count):
            raise Unauthenticated("this call came before")
        if is_known:
            self._live.move_to_end(number)
        else:
            self._remember(number, session)

    def _remember(self, number: int, session: _ServerSession) -> None:
        self._live[number] = session
        if len(self._live) > self._sessions_max:
            dropped, _ = self._live.popitem(last=False)
            self._forgotten = max(self._forgotten, dropped)


def _greeting_proof(secret: ClusterSecret, nonce: bytes, boot: bytes, number: int) -> bytes:
    return secret.derive("grpc greeting", nonce, boot, number.to_bytes(8, "little"))


def _session_key(secret: ClusterSecret, nonce: bytes, boot: bytes, number: int) -> bytes:
    return secret.derive("grpc session", nonce, boot, number.to_bytes(8, "little"))


def _tag(key: bytes, count: int, method: bytes) -> bytes:
    """Keyed BLAKE2b (RFC 7693): with nothing of it in a cache, as between two calls, a third of the time of HMAC."""
    return blake2b(count.to_bytes(8, "little") + method, key=key, digest_size=_TAG_BYTES, person=b"grpc call").digest()
