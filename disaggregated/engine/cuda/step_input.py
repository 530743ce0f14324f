"""What a step needs from the host beside its layout: random numbers, limits of the sampler, whose token to wait for.

Built in numpy and sent in one copy from pinned memory, so that launching a step never waits for the one before.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from disaggregated.engine.api import ScheduledSequence
from disaggregated.engine.philox import uniforms


def to_device(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """Ordered with the current stream; `array` may be forgotten at once. Waits for nothing where it can be pinned."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def sampled_positions(sequence: ScheduledSequence) -> range:
    """Positions, in the sequence, of the tokens that a row brings at most: after its last token and each draft."""
    first = sequence.first_position + len(sequence.token_ids)
    return range(first, first + 1 + len(sequence.draft_token_ids))


def sampling_columns(batch: Sequence[ScheduledSequence]) -> npt.NDArray[np.float64]:
    """(5, number of sampled positions), as `kernels/sampling.py` reads them, row by row."""
    seeds, positions, limits = [], [], []
    for sequence in batch:
        if (sampling := sequence.sampling) is None:
            continue
        for position in sampled_positions(sequence):
            seeds.append(sampling.seed)
            positions.append(position)
            limits.append((sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p))
    columns = np.concatenate([uniforms(seeds, positions)[None], np.array(limits, dtype=np.float64).T])
    return np.ascontiguousarray(columns)  # Joined as they lie, their rows would not be neighbours in memory.


def forbidden_places(batch: Sequence[ScheduledSequence], vocab_size: int) -> npt.NDArray[np.int64]:
    """(2, n): sampled position and token of each logit that must not win. A tokenizer may know ids beyond the model."""
    sampling = [sequence for sequence in batch if sequence.sampling is not None]
    per_position = itertools.chain.from_iterable(
        [sequence.forbidden_token_ids] * len(sampled_positions(sequence)) for sequence in sampling
    )
    places = [(i, token) for i, tokens in enumerate(per_position) for token in tokens if token < vocab_size]
    return np.array(places, dtype=np.int64).reshape(-1, 2).T.copy()


def followed_rows(batch: Sequence[ScheduledSequence]) -> npt.NDArray[np.int64]:
    """(2, n): of each row whose only token is still on the device: where that token stands among the step's tokens, and
    the row of the step before that samples it."""
    places, token = [], 0
    for sequence in batch:
        if sequence.previous_row is not None:
            assert len(sequence.token_ids) == 1, f"{sequence.request_id}: one token is known to the device"
            places.append((token, sequence.previous_row))
        token += len(sequence.token_ids) + len(sequence.draft_token_ids)
    return np.array(places, dtype=np.int64).reshape(-1, 2).T.copy()


def followable_rows(batch: Sequence[ScheduledSequence]) -> npt.NDArray[np.int64]:
    """(2, n): row, and sampled position, of each row that samples exactly one token: the next step may ask for it."""
    places, position = [], 0
    for row, sequence in enumerate(batch):
        if sequence.sampling is None:
            continue
        if not sequence.draft_token_ids:
            places.append((row, position))
        position += 1 + len(sequence.draft_token_ids)
    return np.array(places, dtype=np.int64).reshape(-1, 2).T.copy()
