"""The source's book of promises: which blocks of which transfer may be read, by whom who knows the key, until when.

Three kinds of threads come here: the engine's publishes, the transport's ask before each read, the event loop follows,
releases and reaps. Nothing is computed under the lock.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import secrets
import threading
from collections.abc import Sequence
from typing import Final

from disaggregated.errors import DisaggregatedError, LeaseExpired, StaleEpoch, TransferError
from kvtransfer.machine import SourcePhase, SourceTransfer
from kvtransfer.runs import Run
from kvtransfer.transport import LEASE_KEY_BYTES

ENDED_REMEMBERED: Final = 4096
"""Of the transfers that are over, so many last ones can still say how they ended; older ones are unknown."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Blocks that became readable together; the first is number `first_block` of the prompt's."""

    first_block: int
    block_ids: tuple[int, ...]
    checksums: tuple[int, ...]
    num_tokens: int
    """Of the prompt, covered up to the end of this chunk."""
    layers: range | None = None
    """That became readable; None: all."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """How far the publications of a transfer have come."""

    num_blocks: int
    """In every layer."""
    begun: tuple[int, ...] = ()
    """The blocks behind these, of which the first `num_layers_begun` layers are published and the others are not."""
    num_layers_begun: int = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a finished prefill says about the whole transfer."""

    num_tokens: int
    num_blocks: int
    first_token: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    phase: SourcePhase
    reason: str
    cause: DisaggregatedError | None = None
    """What a destination gave up for, when it said so."""


@dataclasses.dataclass(slots=True)
class Lease:
    """One live transfer. Ended ones are not kept, so a key that is found is a key that holds."""

    transfer: SourceTransfer
    key: bytes
    num_tokens: int
    """Of the whole prompt; 0 when the server did not say."""
    opened_at_s: float
    expires_at_s: float
    chunks: list[Chunk] = dataclasses.field(default_factory=list)
    num_readers: int = 1
    """Destinations that will read it, each all it needs: the blocks are wanted until every one of them has left."""
    readers: set[str] = dataclasses.field(default_factory=set)
    """The peers that follow it. The key is for them alone: who learns it otherwise reads nothing."""
    left: dict[str, SourcePhase] = dataclasses.field(default_factory=dict)
    """How each reader that has left did so: released or given up."""
    readable: dict[int, int] = dataclasses.field(default_factory=dict)
    """Block id to the number of its layers, from the first on, that may be read."""
    published: Published = Published(num_blocks=0)
    outcome: Outcome | None = None

    def is_full_without(self, reader: str) -> bool:
        """All readers that it is meant for are known, and this is none of them."""
        return reader not in self.readers and len(self.readers | self.left.keys()) >= self.num_readers


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What a follower has not been told yet."""

    chunks: tuple[Chunk, ...]
    key: bytes
    outcome: Outcome | None


@dataclasses.dataclass(frozen=True, slots=True)
class Leaving:
    """What a reader's leaving came to."""

    held: bool
    """The lease held for it until then."""
    ended: bool
    """It was the last one: the blocks may be given back."""


class LeaseBook:
    """Thread-safe.

    Invariants: a transfer is live or ended, never both; keys are unique; `readable` is what was published.
    """

    def __init__(self, *, epoch: int, lease_s: float, num_layers: int) -> None:
        """`num_layers`: of the pool, each block of which is readable in its first so many layers."""
        self.epoch = epoch
        self.lease_s = lease_s
        self._num_layers = num_layers
        self._lock = threading.Lock()
        self._live: dict[str, Lease] = {}
        self._by_key: dict[bytes, Lease] = {}
        self._ended: collections.OrderedDict[str, Ending] = collections.OrderedDict()
        self._is_shut = False

    def shut(self) -> None:
        """From here on nothing is opened. Idempotent; what is live stays so."""
        with self._lock:
            self._is_shut = True

    def open(self, transfer_id: str, *, num_tokens: int = 0, num_readers: int = 1, now_s: float) -> None:
        """Raises TransferError when that id is live, or was used before; what its destination gave up for, if so."""
        with self._lock:
            if self._is_shut:
                raise TransferError(f"transfer {transfer_id}: the source is shutting down")
            ended = self._ended.get(transfer_id)
            if ended is not None and ended.cause is not None:
                raise ended.cause
            if transfer_id in self._live or ended is not None:
                raise TransferError(f"transfer {transfer_id} exists already; an id is used once")
            key = secrets.token_bytes(LEASE_KEY_BYTES)
            transfer = SourceTransfer(transfer_id)
            lease = Lease(
                transfer=transfer,
                key=key,
                num_tokens=num_tokens,
                num_readers=num_readers,
                opened_at_s=now_s,
                expires_at_s=now_s + self.lease_s,
            )
            self._live[transfer_id] = self._by_key[key] = lease

    def published(self, transfer_id: str) -> Published | None:
        """None when it is not live: there is nobody to publish for."""
        with self._lock:
            lease = self._live.get(transfer_id)
            return lease.published if lease else None

    def num_readers(self, transfer_id: str) -> int:
        """That it is meant for; 0 when it is not live."""
        with self._lock:
            lease = self._live.get(transfer_id)
            return lease.num_readers if lease else 0

    def num_publications(self, transfer_id: str) -> int:
        with self._lock:
            lease = self._live.get(transfer_id)
            return len(lease.chunks) if lease else 0

    def num_tokens(self, transfer_id: str) -> int:
        """Of the whole prompt; 0 when it is not known, or nobody wants it any more."""
        with self._lock:
            lease = self._live.get(transfer_id)
            return lease.num_tokens if lease else 0

    def publish(self, transfer_id: str, chunk: Chunk, outcome: Outcome | None, *, now_s: float) -> bool:
        """Make a chunk readable. False when the transfer has ended meanwhile; nothing is revived."""
        with self._lock:
            lease = self._live.get(transfer_id)
            if lease is None:
                return False
            published = self._after(chunk, lease.published)
            assert not (outcome and published.begun), f"{transfer_id}: finished within the layers of {chunk}"
            lease.transfer.advance(SourcePhase.FINISHED if outcome else SourcePhase.PUBLISHING, now_s=now_s)
            lease.chunks.append(chunk)
            lease.readable.update(dict.fromkeys(chunk.block_ids, self._layers_of(chunk).stop))
            lease.published = published
            lease.outcome = outcome
            return True

    def progress(self, transfer_id: str, *, after: int, reader: str = "") -> Progress | Ending | None:
        """All chunks from number `after` on; how it ended; None when it has not been opened (as far as is known).

        From here on the lease is for `reader`, if it has a name, and for the others that asked so. Raises TransferError
        when as many as it is meant for have asked before.
        """
        with self._lock:
            lease = self._live.get(transfer_id)
            if lease is None:
                return self._ended.get(transfer_id)
            if reader:
                if lease.is_full_without(reader):
                    raise TransferError(f"transfer {transfer_id} is followed by another destination")
                lease.readers.add(reader)
            return Progress(chunks=tuple(lease.chunks[after:]), key=lease.key, outcome=lease.outcome)

    def renew(self, transfer_id: str, *, now_s: float) -> bool:
        """A sign of life from the destination. False when the lease is over."""
        with self._lock:
            lease = self._live.get(transfer_id)
            if lease is None:
                return False
            lease.expires_at_s = now_s + self.lease_s
            return True

    def ending(self, transfer_id: str) -> Ending | None:
        """How it ended; None when it has not, or so long ago that it is forgotten."""
        with self._lock:
            return self._ended.get(transfer_id)

    def end(
        self,
        transfer_id: str,
        phase: SourcePhase,
        reason: str,
        *,
        now_s: float,
        cause: DisaggregatedError | None = None,
    ) -> bool:
        """True for the one call that ended it: its blocks may be given back. The key opens nothing from here on.

        Raises TransferError when a destination claims to have landed what was never finished.
        """
        ending = Ending(phase=phase, reason=reason, cause=cause)
        with self._lock:
            lease = self._live.get(transfer_id)
            if lease is None:
                self._remember(transfer_id, ending)
                return False
            if phase is SourcePhase.RELEASED and lease.outcome is None:
                raise TransferError(f"transfer {transfer_id} cannot have landed: it is {lease.transfer.phase}")
            ended = lease.transfer.end(phase, now_s=now_s)
            assert ended, f"{transfer_id} is live and over: {lease.transfer.story}"
            del self._live[transfer_id], self._by_key[lease.key]
            self._remember(transfer_id, ending)
            return True

    def leave(
        self,
        transfer_id: str,
        reader: str,
        phase: SourcePhase,
        reason: str,
        *,
        now_s: float,
        cause: DisaggregatedError | None = None,
    ) -> Leaving:
        """One reader has RELEASED it, or GIVEN_UP. The last one to leave ends it; nobody leaves twice, and a stranger
        not at all. A reader that never comes is no leak: the lease runs out on it. Raises as `end` does.
        """
        with self._lock:
            lease = self._live.get(transfer_id)
            if lease is not None:
                if reader in lease.left or lease.is_full_without(reader):
                    return Leaving(held=False, ended=False)
                if phase is SourcePhase.RELEASED and lease.outcome is None:
                    raise TransferError(f"transfer {transfer_id} cannot have landed: it is {lease.transfer.phase}")
                lease.left[reader] = phase
                if len(lease.left) < lease.num_readers:
                    return Leaving(held=True, ended=False)
                if SourcePhase.GIVEN_UP in lease.left.values():
                    phase = SourcePhase.GIVEN_UP
        ended = self.end(transfer_id, phase, reason, now_s=now_s, cause=cause)
        return Leaving(held=ended, ended=ended)

    def due(self, *, now_s: float) -> list[str]:
        """The transfers whose lease has run out."""
        with self._lock:
            return [transfer_id for transfer_id, lease in self._live.items() if lease.expires_at_s <= now_s]

    def next_expiry_s(self) -> float | None:
        """When the earliest lease runs out unless it is renewed."""
        with self._lock:
            return min((lease.expires_at_s for lease in self._live.values()), default=None)

    def live(self) -> list[tuple[str, int, float]]:
        """Transfer id, blocks published so far, when it was opened."""
        with self._lock:
            return [(name, lease.published.num_blocks, lease.opened_at_s) for name, lease in self._live.items()]

    def check_read(
        self, *, lease_key: bytes, epoch: int, blocks: Sequence[Run], layers: range, peer_id: str, now_s: float
    ) -> None:
        """See `ReadGate`. A read that passes is a sign of life."""
        if epoch != self.epoch:
            raise StaleEpoch(f"this source is epoch {self.epoch}, the read is for {epoch}")
        with self._lock:
            lease = self._by_key.get(lease_key)
            if lease is None or lease.expires_at_s <= now_s:
                raise LeaseExpired("no lease has this key (any more)")
            if lease.readers and peer_id not in lease.readers:
                raise LeaseExpired(f"this lease is not for {peer_id}, which does not follow it")
            for run in blocks:
                if min(map(lease.readable.get, range(run.first, run.end), itertools.repeat(0))) < layers.stop:
                    what = f"blocks {run.first} to {run.end - 1} in layers {layers.start} to {layers.stop - 1}"
                    raise TransferError(f"{what} are not published by {lease.transfer.transfer_id}")
            lease.expires_at_s = now_s + self.lease_s

    def check_integrity(self) -> None:
        with self._lock:
            assert self._live.keys().isdisjoint(self._ended), "a transfer is live and over"
            assert len(self._live) == len(self._by_key), f"{len(self._live)} leases, {len(self._by_key)} keys"
            for lease in self._live.values():
                name, readable, published = lease.transfer.transfer_id, {}, Published(num_blocks=0)
                for chunk in lease.chunks:
                    published = self._after(chunk, published)
                    readable.update(dict.fromkeys(chunk.block_ids, self._layers_of(chunk).stop))
                assert (lease.readable, lease.published) == (readable, published), f"{name}: readable is not published"

    def _layers_of(self, chunk: Chunk) -> range:
        return range(self._num_layers) if chunk.layers is None else chunk.layers

    def _after(self, chunk: Chunk, before: Published) -> Published:
        """`before` and this chunk, which continues it."""
        layers = self._layers_of(chunk)
        follows = chunk.first_block == before.num_blocks and layers.start == before.num_layers_begun
        same = not before.begun or chunk.block_ids == before.begun
        assert follows, f"{chunk} after {before}"
        assert same, f"{chunk} after {before}"
        assert 0 < len(layers) <= self._num_layers - layers.start, f"{chunk}, {self._num_layers} layers"
        if layers.stop == self._num_layers:
            return Published(num_blocks=before.num_blocks + len(chunk.block_ids))
        return Published(num_blocks=before.num_blocks, begun=chunk.block_ids, num_layers_begun=layers.stop)

    def _remember(self, transfer_id: str, ending: Ending) -> None:
        """The first ending stands."""
        self._ended.setdefault(transfer_id, ending)
        while len(self._ended) > ENDED_REMEMBERED:
            self._ended.popitem(last=False)
