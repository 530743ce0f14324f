"""A prompt's KV on its way out while the prompt is still computed: what the engine says becomes news for the publisher.

    engine's thread    chunk begins ─▶ layers are written ─▶ … ─▶ step is over ─▶ next chunk
                           │                 │                        │
    publisher          blocks of a       some layers              what is left, and with the last
                       cached prefix     of the chunk             chunk the first token

Nothing here computes, waits or fails: the engine's thread goes on at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from disaggregated.engine.api import ChunkComputed, EngineEvent, RequestFailed, TokensSampled
from disaggregated.engine.layer_watch import ChunkUnderWay
from disaggregated.kv_layout import KVLayout
from kvtransfer import News, TakesNews

GROUPS_OF_SMALL_CHUNK: Final = 3
"""A chunk that is smaller than a few groups goes in so many: what prefill cannot hide is the last one."""
GROUP_BYTES_MIN: Final = 256 << 10
"""A publication costs some tenths of a millisecond of the engine's cores; less than this moves in less time."""


def layers_at_a_time(layout: KVLayout, num_tokens: int, *, layer_group_bytes: int) -> int | None:
    """After how many layers to publish, while `num_tokens` are computed; None: when all are."""
    chunk_bytes = num_tokens * layout.token_bytes
    if chunk_bytes == 0 or layer_group_bytes == 0:
        return None
    group_bytes = min(layer_group_bytes, max(GROUP_BYTES_MIN, chunk_bytes // GROUPS_OF_SMALL_CHUNK))
    every = -(-group_bytes * layout.num_layers // chunk_bytes)
    return every if every < layout.num_layers else None


class PrefillStream:
    """Implements `LayerWatcher`. Called on the engine's thread alone."""

    def __init__(
        self, transfers: Mapping[str, str], publisher: TakesNews, layout: KVLayout, *, layer_group_bytes: int
    ) -> None:
        """`transfers`: engine id to transfer id of every prompt that somebody wants; the role's own table.

        Groups of layers of `layer_group_bytes` are published while their chunk is computed; 0: whole chunks.
        """
        self._transfers = transfers
        self._publisher = publisher
        self._layout = layout
        self._layer_group_bytes = layer_group_bytes

    def chunks_begin(self, chunks: Sequence[ChunkUnderWay]) -> int | None:
        num_tokens = 0
        for chunk in chunks:
            transfer_id = self._transfers.get(chunk.request_id)
            if transfer_id is not None:
                num_tokens += chunk.num_computed_tokens - chunk.first_position
                self._publisher.leave(transfer_id, News(block_ids=chunk.block_ids, num_tokens=chunk.first_position))
        return layers_at_a_time(self._layout, num_tokens, layer_group_bytes=self._layer_group_bytes)

    def layers_written(self, chunks: Sequence[ChunkUnderWay], num_layers: int) -> None:
        for chunk in chunks:
            transfer_id = self._transfers.get(chunk.request_id)
            if transfer_id is not None:
                news = News(
                    block_ids=chunk.block_ids,
                    num_tokens=chunk.first_position,
                    num_tokens_begun=chunk.num_computed_tokens,
                    num_layers_begun=num_layers,
                )
                self._publisher.leave(transfer_id, news)

    def step_is_over(self, events: Sequence[EngineEvent]) -> None:
        """A prompt's last chunk and its first token come in the same step."""
        tables = {event.request_id: event.block_ids for event in events if isinstance(event, ChunkComputed)}
        for event in events:
            transfer_id = self._transfers.get(event.request_id)
            if transfer_id is None or isinstance(event, RequestFailed):
                continue
            table = tables.get(event.request_id, ())
            first_token = event.token_ids[0] if isinstance(event, TokensSampled) else None
            num_tokens = event.first_position if isinstance(event, TokensSampled) else event.num_computed_tokens
            self._publisher.leave(transfer_id, News(block_ids=table, num_tokens=num_tokens, first_token=first_token))
