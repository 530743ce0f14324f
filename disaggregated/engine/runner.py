"""One forward pass of a batch of scheduled sequences, from their token ids to the next token of each.

The host builds the step's layout in numpy, which goes to the device as one array, and waits for it once: when the
sampled tokens come back.

Legend as in `ops/api.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from disaggregated.engine.api import ScheduledSequence
from disaggregated.engine.kv_cache import KVCache
from disaggregated.engine.models.decoder import Decoder
from disaggregated.engine.ops.api import AttentionBatch
from disaggregated.engine.sampler import SampleRow, sample


class TorchModelRunner:
    """Implements `ModelRunner`. Owned by the engine's thread, as are the model's op table and the pool."""

    def __init__(self, model: Decoder, kv_cache: KVCache, device: torch.device) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._device = device

    def execute(self, batch: Sequence[ScheduledSequence]) -> Sequence[int | None]:
        with torch.inference_mode():
            logits, sampling = self._logits(batch)
            tokens: list[int | None] = [None] * len(batch)
            if logits is not None:
                chosen = sample(logits, [_sample_row(batch[row]) for row in sampling])
                for row, token in zip(sampling, chosen, strict=True):
                    tokens[row] = token
        return tokens

    def logits(self, batch: Sequence[ScheduledSequence]) -> torch.Tensor:
        """(rows that sample, V), for whoever wants more of it than one token. Writes KV like execute()."""
        with torch.inference_mode():
            logits, _ = self._logits(batch)
        assert logits is not None, "no row of the batch samples"
        return logits

    def _logits(self, batch: Sequence[ScheduledSequence]) -> tuple[torch.Tensor | None, list[int]]:
        """Logits of the last position of each row that samples, and which rows these are."""
        assert batch, "an empty batch"
        token_ids, attention, last_tokens = step_tensors(batch, self._kv_cache.layout.block_size, self._device)
        hidden = self._model.forward(token_ids, attention, self._kv_cache.layers)
        sampling = [row for row, sequence in enumerate(batch) if sequence.sampling is not None]
        if not sampling:
            return None, sampling
        return self._model.logits(hidden.index_select(0, last_tokens)), sampling


def step_tensors(
    batch: Sequence[ScheduledSequence], block_size: int, device: torch.device
) -> tuple[torch.Tensor, AttentionBatch, torch.Tensor]:
    """Token ids (T), where they lie, and the index in T of each sampling row's last token."""
    lengths = np.array([len(sequence.token_ids) for sequence in batch], dtype=np.int64)
    first_positions = np.array([sequence.first_position for sequence in batch], dtype=np.int64)
    tables = _block_tables(batch)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    row_of_token = np.repeat(np.arange(len(batch)), lengths)
    positions = np.arange(ends[-1]) - starts[row_of_token] + first_positions[row_of_token]
    slots = tables[row_of_token, positions // block_size] * block_size + positions % block_size
    samples = np.array([sequence.sampling is not None for sequence in batch])
    token_ids = np.fromiter((token for sequence in batch for token in sequence.token_ids), np.int64, ends[-1])
    long = _to_device([token_ids, positions, slots, ends[samples] - 1], device, np.int64)
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


def _sample_row(sequence: ScheduledSequence) -> SampleRow:
    assert sequence.sampling is not None, f"{sequence.request_id}: nothing is sampled in the middle of a prompt"
    position = sequence.first_position + len(sequence.token_ids)
    return SampleRow(sequence.sampling, position, sequence.forbidden_token_ids)


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
