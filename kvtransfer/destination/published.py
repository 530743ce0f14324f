"""What a source has published of one transfer, as batches of blocks to read, checked before a byte is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Self

from disaggregated.errors import TransferError
from disaggregated.kv_layout import KVLayout
from disaggregated.v1 import kv_pb2
from kvtransfer.transport import LEASE_KEY_BYTES


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BlockBatch:
    """Blocks that can be read in one go: `source[i]` of the peer's pool lands in our `into[i]`, in each of `layers`.

    `checksums[i]` is over all of `layers` of that block: no smaller part of it can be verified.
    """

    lease_key: bytes
    epoch: int
    source: tuple[int, ...]
    into: tuple[int, ...]
    checksums: tuple[int, ...]
    layers: range

    @property
    def num_block_layers(self) -> int:
        """Blocks of one layer each: what is multiplied with `KVLayout.block_bytes`."""
        return len(self.into) * len(self.layers)

    def part(self, begin: int, end: int) -> Self:
        return dataclasses.replace(
            self,
            source=self.source[begin:end],
            into=self.into[begin:end],
            checksums=self.checksums[begin:end],
        )

    def followed_by(self, other: BlockBatch) -> Self | None:
        """Both as one; None when they are of other layers."""
        if self.layers != other.layers:
            return None
        return dataclasses.replace(
            self,
            source=self.source + other.source,
            into=self.into + other.into,
            checksums=self.checksums + other.checksums,
        )


class PublishedBlocks:
    """All publications of one transfer, in the order in which they came.

    Invariant: they continue each other without a gap, in blocks and, for the blocks named last, in layers; they name
    blocks that exist, and fit our own table.
    """

    def __init__(
        self,
        *,
        epoch: int,
        source_layout: KVLayout,
        into: Sequence[int],
        skip_blocks: int,
        is_wanted: Callable[[int, range], bool] | None = None,
    ) -> None:
        """`is_wanted` is asked about each block, by its number in the prompt, and its layers: others are not read."""
        self._epoch = epoch
        self._source_layout = source_layout
        self._into = into
        self._skip_blocks = skip_blocks
        self._is_wanted = is_wanted
        self._lease_key = b""
        self._num_whole = 0
        """Blocks published in every layer."""
        self._begun: tuple[int, ...] = ()
        """The blocks after these, when only their first `_num_layers_begun` layers are published."""
        self._num_layers_begun = 0
        self._waiting: list[BlockBatch] = []
        self.landing: kv_pb2.Landing | None = None

    def add(self, publication: kv_pb2.Publication) -> None:
        """Raises TransferError when the source contradicts itself or us."""
        if publication.epoch != self._epoch or self.landing is not None:
            raise TransferError(
                f"a publication of epoch {publication.epoch} {'after the last one' * bool(self.landing)}"
            )
        layers = self._layers_of(publication)
        self._check_blocks(publication)
        self._lease_key = publication.lease_key or self._lease_key
        if len(self._lease_key) != LEASE_KEY_BYTES and publication.block_ids:
            raise TransferError(f"a lease key of {len(self._lease_key)} bytes; it has {LEASE_KEY_BYTES}")
        block_ids = tuple(publication.block_ids)
        self._await(self._num_whole, block_ids, tuple(publication.checksums), layers)
        if layers.stop == self._source_layout.num_layers:
            self._num_whole += len(block_ids)
            self._begun, self._num_layers_begun = (), 0
        else:
            self._begun, self._num_layers_begun = block_ids, layers.stop
        if publication.HasField("landing"):
            self._finish(publication.landing)

    def take(self) -> list[BlockBatch]:
        """What was published since the last take, less what we hold already, in the order in which it is to be read."""
        taken, self._waiting = self._waiting, []
        return taken

    def _layers_of(self, publication: kv_pb2.Publication) -> range:
        """Those of a publication that continues the one before it."""
        num_layers = self._source_layout.num_layers
        first, count = publication.first_layer, publication.num_layers
        layers = range(first, first + count) if first or count else range(num_layers)
        if layers.start != self._num_layers_begun or not layers or layers.stop > num_layers:
            raise TransferError(
                f"layers {layers.start} to {layers.stop} of {num_layers} were published after {self._num_layers_begun}"
            )
        return layers

    def _check_blocks(self, publication: kv_pb2.Publication) -> None:
        block_ids, num_layers = tuple(publication.block_ids), self._source_layout.num_layers
        if publication.first_block != self._num_whole or len(block_ids) != len(publication.checksums):
            raise TransferError(
                f"block {publication.first_block} with {len(block_ids)} ids and "
                f"{len(publication.checksums)} checksums was published after {self._num_whole} blocks"
            )
        if self._begun and block_ids != self._begun:
            raise TransferError(f"layers of blocks {block_ids} were published after those of {self._begun}")
        if not block_ids and 0 < publication.num_layers < num_layers:
            raise TransferError("some layers of no block were published")
        if any(block_id >= self._source_layout.num_blocks for block_id in block_ids):
            raise TransferError(f"a published block is not in a pool of {self._source_layout.num_blocks}")
        if (end := self._num_whole + len(block_ids)) > len(self._into):
            raise TransferError(f"{end} blocks were published, {len(self._into)} are reserved here")

    def _await(self, first: int, source: tuple[int, ...], checksums: tuple[int, ...], layers: range) -> None:
        """Add what is wanted and not here yet to what waits to be read; whole blocks join those before them."""
        here = range(min(max(0, self._skip_blocks - first), len(source)), len(source))
        if self._is_wanted is not None:
            chosen = [number for number in here if self._is_wanted(first + number, layers)]
        else:
            chosen = list(here)
        if not chosen:
            return
        batch = BlockBatch(
            lease_key=self._lease_key,
            epoch=self._epoch,
            source=tuple(source[number] for number in chosen),
            into=tuple(self._into[first + number] for number in chosen),
            checksums=tuple(checksums[number] for number in chosen),
            layers=layers,
        )
        is_whole = len(layers) == self._source_layout.num_layers
        joined = self._waiting[-1].followed_by(batch) if self._waiting and is_whole else None
        if joined is None:
            self._waiting.append(batch)
        else:
            self._waiting[-1] = joined

    def _finish(self, landing: kv_pb2.Landing) -> None:
        expected = self._source_layout.num_blocks_for(landing.num_tokens)
        if self._begun or not landing.num_blocks == self._num_whole == expected:
            raise TransferError(
                f"{landing.num_tokens} tokens are {expected} blocks, the source counts {landing.num_blocks} "
                f"and has published {self._num_whole}, and some layers of {len(self._begun)}"
            )
        if self._skip_blocks > landing.num_blocks:
            raise TransferError(f"{self._skip_blocks} blocks are said to be here, the prompt has {landing.num_blocks}")
        self.landing = landing
