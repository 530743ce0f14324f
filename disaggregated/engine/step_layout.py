"""Where the tokens of a step lie, built by the host in numpy, and sent to the device as one array of each kind.

A step of nothing but decoding, one token a row, is laid out by itself: a server does little else, and the general way
takes some thirty calls of numpy, whose code the weights have driven out of the caches since the step before.

Legend as in `ops/api.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from disaggregated.engine.api import ScheduledSequence
from disaggregated.engine.ops.api import AttentionBatch


def step_tensors(
    batch: Sequence[ScheduledSequence], block_size: int, device: torch.device
) -> tuple[torch.Tensor, AttentionBatch, torch.Tensor]:
    """Token ids (T), where they lie, and the indices in T of the positions that are sampled after, row by row.

    These are each sampling row's last token and its drafts.
    """
    if all(len(row.token_ids) == 1 and row.sampling is not None and not row.draft_token_ids for row in batch):
        return _decode_step(batch, block_size, device)
    return _any_step(batch, block_size, device)


def _decode_step(
    batch: Sequence[ScheduledSequence], block_size: int, device: torch.device
) -> tuple[torch.Tensor, AttentionBatch, torch.Tensor]:
    """Each row is one token, and sampled after."""
    num_rows, width = len(batch), max(len(row.block_table) for row in batch)
    places = [row.first_position for row in batch]
    slots = [
        row.block_table[place // block_size] * block_size + place % block_size
        for row, place in zip(batch, places, strict=True)
    ]
    long_XT = np.array([[row.token_ids[0] for row in batch], places, slots, range(num_rows)], np.int64)
    ints = np.zeros(1 + (2 + width) * num_rows, np.int32)
    ints[: num_rows + 1] = range(num_rows + 1)
    ints[num_rows + 1 : 2 * num_rows + 1] = places
    for row, start in zip(batch, range(2 * num_rows + 1, len(ints), width), strict=True):
        ints[start : start + len(row.block_table)] = row.block_table
    token_ids, positions, slots_T, sampled = torch.from_numpy(long_XT).to(device, non_blocking=True)
    starts, firsts, tables = torch.split(
        torch.from_numpy(ints).to(device, non_blocking=True), [num_rows + 1, num_rows, width * num_rows]
    )
    attention = AttentionBatch(
        query_start=starts,
        first_position=firsts,
        block_tables=tables.view(num_rows, width),
        positions=positions,
        slots=slots_T,
        max_context_len=max(places) + 1,
        rows=tuple((place, 1) for place in places),
    )
    return token_ids, attention, sampled


def _any_step(
    batch: Sequence[ScheduledSequence], block_size: int, device: torch.device
) -> tuple[torch.Tensor, AttentionBatch, torch.Tensor]:
    num_drafts = np.array([len(sequence.draft_token_ids) for sequence in batch], dtype=np.int64)
    lengths = np.array([len(sequence.token_ids) for sequence in batch], dtype=np.int64) + num_drafts
    first_positions = np.array([sequence.first_position for sequence in batch], dtype=np.int64)
    tables = _block_tables(batch)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    row_of_token = np.repeat(np.arange(len(batch)), lengths)
    positions = np.arange(ends[-1]) - starts[row_of_token] + first_positions[row_of_token]
    slots = tables[row_of_token, positions // block_size] * block_size + positions % block_size
    token_ids = np.fromiter(
        (token for row in batch for tokens in (row.token_ids, row.draft_token_ids) for token in tokens),
        np.int64,
        ends[-1],
    )
    num_sampled = np.array([sequence.sampling is not None for sequence in batch]) * (1 + num_drafts)
    offsets = np.arange(num_sampled.sum()) - np.repeat(np.cumsum(num_sampled) - num_sampled, num_sampled)
    sampled_positions = np.repeat(ends - num_sampled, num_sampled) + offsets
    long = _to_device([token_ids, positions, slots, sampled_positions], device, np.int64)
    ints = _to_device([np.append(starts, ends[-1]), first_positions, tables.ravel()], device, np.int32)
    attention = AttentionBatch(
        query_start=ints[0],
        first_position=ints[1],
        block_tables=ints[2].view(tables.shape),
        positions=long[1],
        slots=long[2],
        max_context_len=int((first_positions + lengths).max()),
        rows=tuple(zip(first_positions.tolist(), lengths.tolist(), strict=True)),
    )
    return long[0], attention, long[3]


def _block_tables(batch: Sequence[ScheduledSequence]) -> npt.NDArray[np.int64]:
    tables = np.zeros((len(batch), max(len(sequence.block_table) for sequence in batch)), dtype=np.int64)
    for row, sequence in enumerate(batch):
        tables[row, : len(sequence.block_table)] = sequence.block_table
    return tables


def _to_device(
    arrays: Sequence[npt.NDArray[np.int64]], device: torch.device, dtype: type[np.signedinteger]
) -> Sequence[torch.Tensor]:
    """One copy for all of them."""
    joined = torch.from_numpy(np.concatenate(arrays).astype(dtype, copy=False)).to(device, non_blocking=True)
    return torch.split(joined, [array.size for array in arrays])
