"""What a context server makes of the engine's chunks, layers and tokens, for whoever publishes them."""

from __future__ import annotations

import dataclasses

import pytest

from context_server.streaming import GROUP_BYTES_MIN, GROUPS_OF_SMALL_CHUNK, PrefillStream, layers_at_a_time
from disaggregated.engine.api import ChunkComputed, RequestFailed, TokensSampled
from disaggregated.engine.layer_watch import ChunkUnderWay
from disaggregated.kv_layout import KVLayout
from kvtransfer import News

LAYOUT = KVLayout(num_layers=30, num_kv_heads=3, head_dim=64, block_size=32, dtype="float32", num_blocks=99)
"""1,536 bytes of a token in a layer."""


class Notes:
    """Implements `TakesNews`."""

    def __init__(self) -> None:
        self.left: list[tuple[str, News]] = []

    def leave(self, transfer_id: str, news: News) -> None:
        self.left.append((transfer_id, news))


@dataclasses.dataclass
class Made:
    notes: Notes
    transfers: dict[str, str]
    stream: PrefillStream


@pytest.fixture
def made() -> Made:
    notes, transfers = Notes(), {"e1": "t1"}
    return Made(notes, transfers, PrefillStream(transfers, notes, LAYOUT, layer_group_bytes=1 << 20))


def chunk(request_id: str, first: int, end: int) -> ChunkUnderWay:
    return ChunkUnderWay(request_id=request_id, first_position=first, num_computed_tokens=end, block_ids=(5, 6))


def computed(request_id: str, num_tokens: int) -> ChunkComputed:
    return ChunkComputed(request_id=request_id, num_computed_tokens=num_tokens, num_cached_tokens=0, block_ids=(5, 6))


def test_what_the_prefix_cache_holds_is_told_before_the_first_layer(made: Made) -> None:
    assert made.stream.chunks_begin([chunk("e1", 64, 320)]) == 3
    assert made.notes.left == [("t1", News(block_ids=(5, 6), num_tokens=64))]


def test_layers_are_told_with_what_is_whole_before_them(made: Made) -> None:
    made.stream.layers_written([chunk("e1", 64, 320), chunk("nobody", 0, 9)], 6)
    news = News(block_ids=(5, 6), num_tokens=64, num_tokens_begun=320, num_layers_begun=6)
    assert made.notes.left == [("t1", news)]


def test_a_chunk_that_nobody_wants_is_computed_in_one_call(made: Made) -> None:
    assert made.stream.chunks_begin([chunk("nobody", 0, 256)]) is None
    assert made.notes.left == []


def test_a_transfer_that_ends_within_a_step_is_told_nothing_more(made: Made) -> None:
    made.stream.chunks_begin([chunk("e1", 0, 256)])
    made.transfers.clear()
    made.notes.left.clear()
    made.stream.layers_written([chunk("e1", 0, 256)], 3)
    made.stream.step_is_over([computed("e1", 256)])
    assert made.notes.left == []


def test_the_last_chunk_and_the_first_token_come_in_one_step(made: Made) -> None:
    token = TokensSampled(request_id="e1", first_position=300, token_ids=(42,))
    made.stream.step_is_over([computed("e1", 300), computed("nobody", 9), token])
    assert [news for _, news in made.notes.left] == [
        News(block_ids=(5, 6), num_tokens=300),
        News(block_ids=(5, 6), num_tokens=300, first_token=42),
    ]


def test_a_failure_is_no_news(made: Made) -> None:
    made.stream.step_is_over([RequestFailed(request_id="e1", error=ValueError())])
    assert made.notes.left == []


@pytest.mark.parametrize(
    ("num_tokens", "group_bytes", "layers"),
    [
        (256, 0, None),  # Switched off.
        (0, 1 << 20, None),
        (256, 1 << 20, 3),  # 384 KiB a layer.
        (256, 4 << 20, 10),  # A third of the chunk is less than 4 MiB.
        (2048, 4 << 20, 2),  # 3 MiB a layer.
        (2048, 1 << 20, 1),
        (16, 4 << 20, 11),  # 24 KiB a layer: the smallest group is 256 KiB.
        (4, 4 << 20, None),  # All of it is less.
    ],
)
def test_groups_are_neither_too_small_to_be_worth_it_nor_a_whole_chunk(
    num_tokens: int, group_bytes: int, layers: int | None
) -> None:
    assert layers_at_a_time(LAYOUT, num_tokens, layer_group_bytes=group_bytes) == layers


@pytest.mark.parametrize("num_tokens", range(1, 4000, 37))
def test_what_prefill_cannot_hide_is_a_third_of_a_chunk_or_little(num_tokens: int) -> None:
    every = layers_at_a_time(LAYOUT, num_tokens, layer_group_bytes=4 << 20) or LAYOUT.num_layers
    layer_bytes = num_tokens * LAYOUT.token_bytes // LAYOUT.num_layers
    assert (
        every * layer_bytes
        < max(LAYOUT.num_layers * layer_bytes // GROUPS_OF_SMALL_CHUNK, GROUP_BYTES_MIN) + layer_bytes
    )
