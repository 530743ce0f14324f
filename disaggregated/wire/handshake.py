"""Both ends prove that they know the cluster's secret before either believes a frame of the other.

    server ── CHALLENGE: magic, nonce ──▶ caller
    caller ── HELLO: nonce, proof over both nonces ──▶ server
    server ── WELCOME: proof over both nonces, with another key ──▶ caller        or nothing, and it hangs up

Each message has a fixed size, so nothing is parsed of a stranger. Nonces are fresh: what was recorded is of no use.
Proofs are of the connection, not of its frames: against someone who changes packets on the way there is TLS.
"""

from __future__ import annotations

import secrets
from typing import Final

from disaggregated.errors import Unauthenticated
from disaggregated.security.secret import ClusterSecret, same
from disaggregated.security.session import HOW_TO_JOIN

MAGIC: Final = b"DISAGGW1"
NONCE_BYTES: Final = 16
PROOF_BYTES: Final = 32
CHALLENGE_BYTES: Final = len(MAGIC) + 1 + NONCE_BYTES
HELLO_BYTES: Final = NONCE_BYTES + PROOF_BYTES
WELCOME_BYTES: Final = PROOF_BYTES
HANDSHAKE_TIMEOUT_S: Final = 5.0


class ServerHandshake:
    def __init__(self, secret: ClusterSecret) -> None:
        self._secret = secret
        self._nonce = secrets.token_bytes(NONCE_BYTES)

    def challenge(self) -> bytes:
        """Says, too, whether there is a secret: a caller with one does not speak to a server without."""
        return MAGIC + (b"\0" if self._secret.is_open else b"\1") + self._nonce

    def welcome(self, hello: bytes) -> bytes:
        """
        Raises:
            Unauthenticated: the caller does not know our secret.
        """
        nonce, proof = hello[:NONCE_BYTES], hello[NONCE_BYTES:]
        if not same(_proof(self._secret, "wire caller", self._nonce, nonce), proof):
            raise Unauthenticated(f"a caller does not know the cluster's secret: {HOW_TO_JOIN}")
        return _proof(self._secret, "wire server", self._nonce, nonce)


class CallerHandshake:
    def __init__(self, secret: ClusterSecret, *, address: str) -> None:
        self._secret = secret
        self._address = address
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._expected = b""

    def hello(self, challenge: bytes) -> bytes:
        """
        Raises:
            Unauthenticated: this is no server of ours, or one without a secret.
        """
        if not challenge.startswith(MAGIC):
            raise Unauthenticated(f"what answers at {self._address} is no server of ours")
        if challenge[len(MAGIC)] == 0 and not self._secret.is_open:
            raise Unauthenticated(f"{self._address} has no cluster secret, and we have one: {HOW_TO_JOIN}")
        nonce = challenge[len(MAGIC) + 1 :]
        self._expected = _proof(self._secret, "wire server", nonce, self._nonce)
        return self._nonce + _proof(self._secret, "wire caller", nonce, self._nonce)

    def check(self, welcome: bytes) -> None:
        """
        Raises:
            Unauthenticated: the server does not know our secret.
        """
        if not same(self._expected, welcome):
            raise Unauthenticated(f"{self._address} has another cluster secret than we: {HOW_TO_JOIN}")


def _proof(secret: ClusterSecret, purpose: str, server_nonce: bytes, caller_nonce: bytes) -> bytes:
    return secret.derive(purpose, server_nonce, caller_nonce)
