"""Whole blocks from one pool to another, and the checksums of what was stored: one launch for a whole read.

A program has one block of one layer. What it copies may be another process's memory, or another GPU's, mapped into
ours: so pools come as addresses. The checksum is that of `kvtransfer/device_pool.py`; its sum is of integers, hence the
same in any order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

CHUNK_WORDS = 2048
"""Of 64 bits, that a program has under way at once: 64 bytes a thread."""


@triton.jit
def _mix(word):
    """Of unsigned words: one to one, and every bit of it depends on every bit of `word`."""
    word = (word ^ (word >> 33)) * 0xFF51AFD7ED558CCD
    word = (word ^ (word >> 33)) * 0xC4CEB9FE1A85EC53
    return word ^ (word >> 33)


@triton.jit(
    do_not_specialize=[
        "source", "into", "source_ids", "into_ids", "sums",
        "first_layer", "source_layer_words", "into_layer_words", "words", "num_blocks",
    ]
)  # fmt: skip
def _move_and_sum(
    source: tl.int64, into: tl.int64, source_ids, into_ids, sums,
    first_layer: tl.int64, source_layer_words: tl.int64, into_layer_words: tl.int64, words: tl.int64,
    num_blocks: tl.int64, CHUNK: tl.constexpr, IS_COPY: tl.constexpr,
):  # fmt: skip
    """Program (i, j): block `source_ids[i]` of layer `first_layer + j`, stored as `into_ids[i]` where IS_COPY."""
    number, layer = tl.program_id(0), first_layer + tl.program_id(1)
    source_at = layer * source_layer_words + tl.load(source_ids + number) * words
    source_at = source.to(tl.pointer_type(tl.uint64)) + source_at
    into_at = layer * into_layer_words + tl.load(into_ids + number) * words
    into_at = into.to(tl.pointer_type(tl.uint64)) + into_at
    total = tl.zeros((CHUNK,), tl.uint64)
    for begin in range(0, words, CHUNK):
        index = begin + tl.arange(0, CHUNK)
        is_here = index < words
        word = tl.load(source_at + index, mask=is_here, other=0)
        if IS_COPY:
            tl.store(into_at + index, word, mask=is_here)
        place = (layer * words + index + 1).to(tl.uint64)
        total += tl.where(is_here, _mix(word ^ (place * 0x9E3779B97F4A7C15)), 0)
    tl.store(sums + tl.program_id(1) * num_blocks + number, tl.sum(total, 0).to(tl.int64))


def move_and_sum(
    addresses: tuple[int, int], ids_2N: torch.Tensor, layers: range, layer_words: tuple[int, int], words: int,
    *, is_copy: bool,
) -> torch.Tensor:  # fmt: skip
    """(N) int64, a checksum a block, whose bits are an unsigned number's.

    `addresses` and `layer_words`, the words from one layer to the next, are of the pool that is read and of ours;
    `ids_2N` are blocks of the one and of the other, int64 on the device. Unless `is_copy`, nothing is stored.
    """
    _, num_blocks = ids_2N.shape
    sums = torch.empty(len(layers), num_blocks, dtype=torch.int64, device=ids_2N.device)
    chunk = min(CHUNK_WORDS, triton.next_power_of_2(words))
    _move_and_sum[(num_blocks, len(layers))](
        *addresses, ids_2N[0], ids_2N[1], sums, layers.start, *layer_words, words, num_blocks,
        CHUNK=chunk, IS_COPY=is_copy, num_warps=8 if chunk == CHUNK_WORDS else 4,
    )  # fmt: skip
    return sums.sum(0)
