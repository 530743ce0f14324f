"""How the two ends of a control socket prove to each other that they know the cluster's secret.

    source                                                     destination
    CHALLENGE  n_s, fresh for this connection         ──▶
                              ◀──  HELLO  n_d, fresh, too; whom it means (epoch), who it is, its tail; proof_d
    WELCOME  epoch, size of the pool, tail; proof_s   ──▶      from here on it asks for blocks

    endpoint key    = HMAC(cluster secret, "kv endpoint", nonce of the offer)
    connection key  = HMAC(endpoint key, "kv connection", n_s, n_d)
    proof_d         = HMAC(connection key, "destination", everything in HELLO)
    proof_s         = HMAC(connection key, "source", proof_d, everything in WELCOME)

So no secret travels; a recorded HELLO opens nothing, since n_s is another one the next time; an endpoint that answers
at a reused address has another nonce, so it is another one to us; and a source that does not know the secret gets no
lease key. What follows is not encrypted: who can change packets on the way can change blocks, which checksums then
find only when it was not done on purpose.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
from typing import Final, Self

from disaggregated.errors import StaleEpoch, TransferError, WrongSecret
from disaggregated.security import membership
from disaggregated.security.secret import ClusterSecret, mac, same
from kvtransfer.transport import Offer, OurEnd, SourceIdentity
from kvtransfer.transports import frames
from kvtransfer.transports.frame_socket import FrameSocket
from kvtransfer.transports.frames import Hello, Kind, Welcome

_HINT: Final = "both processes need the same cluster secret (cluster_secret_file, or DISAGG_CLUSTER_SECRET)"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EndpointIdentity:
    """Which endpoint this is, and how it tells members of its cluster from strangers. Made new for each endpoint."""

    epoch: int
    nonce: bytes
    key: bytes = dataclasses.field(repr=False)

    @classmethod
    def fresh(cls, epoch: int, *, secret: ClusterSecret | None = None) -> Self:
        """`secret` is this process's own unless it is given."""
        nonce = secrets.token_bytes(frames.NONCE_BYTES)
        return cls(epoch=epoch, nonce=nonce, key=_endpoint_key(secret, nonce))

    def address(self, place: str) -> str:
        """What an offer says; `Introduction` reads it."""
        return f"{place}/{self.nonce.hex()}"

    def check(self, hello: Hello, *, challenge: bytes) -> None:
        """Raises WrongSecret for a stranger, and for a recording; StaleEpoch for who means another incarnation."""
        key = _connection_key(self.key, challenge, hello.nonce)
        if not same(_destination_proof(key, hello), hello.proof):
            raise WrongSecret(f"{hello.peer_id!r} could not prove that it knows this endpoint's secret: {_HINT}")
        if hello.epoch != self.epoch:
            raise StaleEpoch(f"this source is epoch {self.epoch}, the peer asked for {hello.epoch}")

    def welcome(self, hello: Hello, *, challenge: bytes, region_bytes: int, tail: bytes) -> Welcome:
        """The answer to a HELLO that was checked."""
        key = _connection_key(self.key, challenge, hello.nonce)
        unproven = Welcome(epoch=self.epoch, region_bytes=region_bytes, tail=tail, proof=b"")
        return dataclasses.replace(unproven, proof=_source_proof(key, hello.proof, unproven))


class Introduction:
    """What a destination says on each of its connections to one endpoint, and how it knows who answers."""

    def __init__(
        self, offer: Offer, source: SourceIdentity, us: OurEnd, *, secret: ClusterSecret | None = None
    ) -> None:
        """Raises TransferError when the offer is not an address of ours."""
        self.place, nonce = offer.split()
        """Where to connect to, as the transport wrote it."""
        if len(nonce) != frames.NONCE_BYTES:
            raise TransferError(f"the {offer.name} offer's address has a nonce of {len(nonce)} bytes")
        self._key = _endpoint_key(secret, nonce)
        self._source = source
        self._peer_id = us.peer_id

    def meet(self, connection: FrameSocket, *, tail: bytes = b"") -> Welcome:
        """Say HELLO and check the WELCOME. `connection` is new, with its waits limited; the caller closes it.

        Raises:
            WrongSecret: one of the two ends does not know the secret.
            StaleEpoch: the source is another incarnation.
            TransferError: it refused, is not one of ours, or its pool is not the one that Connect told about.
        """
        hello, key = self._say_hello(connection, tail)
        _, body = connection.receive_frame(Kind.WELCOME)
        return self._checked(frames.unpack_welcome(body), hello, key)

    def meet_for_descriptor(self, connection: FrameSocket, *, tail: bytes = b"") -> tuple[Welcome, int]:
        """The same, over a unix socket, with the descriptor that came along; it is the caller's to close."""
        hello, key = self._say_hello(connection, tail)
        body, fd = connection.receive_with_descriptor()
        try:
            return self._checked(frames.unpack_welcome(body), hello, key), fd
        except BaseException:
            os.close(fd)
            raise

    def _say_hello(self, connection: FrameSocket, tail: bytes) -> tuple[Hello, bytes]:
        _, body = connection.receive_frame(Kind.CHALLENGE)
        nonce = secrets.token_bytes(frames.NONCE_BYTES)
        key = _connection_key(self._key, frames.unpack_challenge(body), nonce)
        unproven = Hello(nonce=nonce, epoch=self._source.epoch, peer_id=self._peer_id, tail=tail, proof=b"")
        hello = dataclasses.replace(unproven, proof=_destination_proof(key, unproven))
        connection.send(frames.pack_hello(hello))
        return hello, key

    def _checked(self, welcome: Welcome, hello: Hello, key: bytes) -> Welcome:
        if not same(_source_proof(key, hello.proof, welcome), welcome.proof):
            raise WrongSecret(f"what answers as {self._source.instance_id} does not know the secret: {_HINT}")
        if welcome.epoch != self._source.epoch:
            raise StaleEpoch(f"the source is epoch {welcome.epoch}, {self._source.epoch} was expected")
        if welcome.region_bytes != (expected := self._source.layout.pool_bytes):
            raise TransferError(f"the source's region is {welcome.region_bytes} bytes, its layout {expected}")
        return welcome


def _endpoint_key(secret: ClusterSecret | None, nonce: bytes) -> bytes:
    known = membership.of_this_process().secret if secret is None else secret
    return known.derive("kv endpoint", nonce)


def _connection_key(endpoint_key: bytes, challenge: bytes, nonce: bytes) -> bytes:
    return mac(endpoint_key, "kv connection", challenge, nonce)


def _destination_proof(key: bytes, hello: Hello) -> bytes:
    return mac(key, "destination", _number(hello.epoch), frames.peer_id_bytes(hello.peer_id), hello.tail)


def _source_proof(key: bytes, destination_proof: bytes, welcome: Welcome) -> bytes:
    return mac(key, "source", destination_proof, _number(welcome.epoch), _number(welcome.region_bytes), welcome.tail)


def _number(value: int) -> bytes:
    return value.to_bytes(8, "little")
