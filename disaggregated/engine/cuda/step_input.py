"""What a step needs from the host beside its layout: random numbers, limits of the sampler, whose token to wait for.

Built in numpy and sent in one copy from pinned memory, so that launching a step never waits for the one before.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from disaggregated.engine.api import ScheduledSequence
from disaggregated.engine.philox import uniforms
from disaggregated.engine.sample_row import SampleRow


def sampling_columns(rows: Sequence[SampleRow]) -> npt.NDArray[np.float64]:
    """(5, number of sampled positions), as `kernels/sampling.py` reads them."""
    seeds = [row.sampling.seed for row in rows]
    limits = [(row.sampling.temperature, row.sampling.top_k, row.sampling.top_p, row.sampling.min_p) for row in rows]
    uniform = uniforms(seeds, [row.position for row in rows])
    columns = np.concatenate([uniform[None], np.array(limits, dtype=np.float64).T])
    return np.ascontiguousarray(columns)  # Joined as they lie, their rows would not be neighbours in memory.


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
