"""A prompt's KV on its way out while the prompt is still computed: what the engine says becomes news for the publisher.

    engine's thread    chunk begins ─▶ layers are written ─▶ … ─▶ step is over ─▶ next chunk
                           │                 │                        │
    publisher          blocks of a       some layers              what is left, and with the last
                       cached prefix     of the chunk             chunk the first token

Nothing here computes, waits or fails: the engine's thread goes on at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from disaggregated.engine.api import ChunkComputed, EngineEvent, RequestFailed, TokensSampled
from disaggregated.engine.layer_watch import ChunkUnderWay
from disaggregated.kv_layout import KVLayout
from kvtransfer import News, TakesNews


class PrefillStream:
    """Implements `LayerWatcher`. Called on the engine's thread alone."""

    def __init__(
        self, transfers: Mapping[str, str], publisher: TakesNews, layout: KVLayout, *, layer_group_bytes: int
    ) -> None:
        """`transfers`: engine id to transfer id of every prompt that somebody wants; the role's own table.

        Groups of layers of at least `layer_group_bytes` are published while their chunk is computed; 0: whole chunks.
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
        layer_bytes = num_tokens * self._layout.token_bytes // self._layout.num_layers
        if layer_bytes == 0 or self._layer_group_bytes == 0:
            return None
        every = -(-self._layer_group_bytes // layer_bytes)
        return every if every < self._layout.num_layers else None

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
