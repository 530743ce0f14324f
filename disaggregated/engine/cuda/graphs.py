"""Decode steps as CUDA graphs: one launch for all kernels of a forward pass, whose inputs lie in fixed places.

A graph has a fixed number of rows. A smaller batch is filled up with dummy requests of one token, whose KV goes to a
scratch block that no sequence owns; rows do not disturb each other, so the others' bits are what they would be alone.
The length of contexts is not fixed: kernels find it in the inputs, up to the table's width.

Legend as in `ops/api.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from disaggregated.engine.api import ScheduledSequence
from disaggregated.engine.ops.api import AttentionBatch
from disaggregated.engine.upload import to_device

Forward = Callable[[torch.Tensor, AttentionBatch], torch.Tensor]
"""(token ids, their layout) → logits of every token."""
Replay = Callable[[], None]
Prepare = Callable[[AttentionBatch, Sequence[int], npt.NDArray[np.int32]], None]
"""Tells attention that plans on the host, before each run, what a graph's batch is: context lengths, block tables."""
Capture = Callable[[Callable[[], torch.Tensor]], tuple[Replay, torch.Tensor]]
"""Records what a call launches; the replay writes into the returned tensor again."""

_TOKEN_IDS, _FOLLOWED, _POSITIONS, _SLOTS = range(4)
_NOBODY = -1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GraphLimits:
    block_size: int
    context_len_max: int
    """Tokens of the longest sequence that a graph can take; longer ones are computed without."""
    scratch_block: int
    """A block of the pool that the engine does not know of."""

    @property
    def table_width(self) -> int:
        return -(-self.context_len_max // self.block_size)


class DecodeGraph:
    """One captured size. `run()` launches; nothing here waits for the device."""

    def __init__(
        self,
        num_rows: int,
        limits: GraphLimits,
        last_tokens: torch.Tensor,
        forward: Forward,
        capture: Capture,
        *,
        prepare: Prepare | None = None,
    ) -> None:
        """`last_tokens` is where the step before leaves its tokens by row, on the device; its address is recorded."""
        self.num_rows = num_rows
        self._limits = limits
        self._prepare = prepare
        self._device = last_tokens.device
        self._longs = torch.zeros(4, num_rows, dtype=torch.int64, device=self._device)
        self._first_position = torch.zeros(num_rows, dtype=torch.int32, device=self._device)
        self._tables = torch.zeros(num_rows, limits.table_width, dtype=torch.int32, device=self._device)
        self._batch = AttentionBatch(  # Kept: a recorded kernel reads its tensors again at each replay.
            query_start=torch.arange(num_rows + 1, dtype=torch.int32, device=self._device),
            first_position=self._first_position,
            block_tables=self._tables,
            positions=self._longs[_POSITIONS],
            slots=self._longs[_SLOTS],
            max_context_len=limits.context_len_max,
        )
        self._fill([])
        self._replay, self._logits = capture(lambda: forward(self._token_ids(last_tokens), self._batch))

    def fits(self, batch: Sequence[ScheduledSequence]) -> bool:
        return len(batch) <= self.num_rows and all(row.first_position < self._limits.context_len_max for row in batch)

    def run(self, batch: Sequence[ScheduledSequence]) -> torch.Tensor:
        """(len(batch), V) logits; overwritten by the next run."""
        self._fill(batch)
        self._replay()
        return self._logits[: len(batch)]

    def _token_ids(self, last_tokens: torch.Tensor) -> torch.Tensor:
        """Recorded with the rest: what the host did not know yet is taken from the step before."""
        followed = self._longs[_FOLLOWED]
        known = last_tokens.index_select(0, followed.clamp(min=0))
        return torch.where(followed == _NOBODY, self._longs[_TOKEN_IDS], known)

    def _fill(self, batch: Sequence[ScheduledSequence]) -> None:
        size = self._limits.block_size
        longs = np.zeros((4, self.num_rows), dtype=np.int64)
        longs[_FOLLOWED] = _NOBODY
        longs[_SLOTS] = self._limits.scratch_block * size
        tables = np.full((self.num_rows, self._limits.table_width), self._limits.scratch_block, dtype=np.int32)
        for i, row in enumerate(batch):
            position = row.first_position
            if row.previous_row is None:
                longs[_TOKEN_IDS, i] = row.token_ids[0]
            else:
                longs[_FOLLOWED, i] = row.previous_row
            longs[_POSITIONS, i] = position
            longs[_SLOTS, i] = row.block_table[position // size] * size + position % size
            num_blocks = position // size + 1
            tables[i, :num_blocks] = row.block_table[:num_blocks]
        width = max((row.first_position // size + 1 for row in batch), default=self._limits.table_width)
        self._longs.copy_(to_device(longs, self._device), non_blocking=True)
        self._first_position.copy_(self._longs[_POSITIONS], non_blocking=True)
        used = to_device(np.ascontiguousarray(tables[:, :width]), self._device)
        self._tables[:, :width].copy_(used, non_blocking=True)
        if self._prepare is not None:
            dummies = [1] * (self.num_rows - len(batch))
            self._prepare(self._batch, [*(row.first_position + 1 for row in batch), *dummies], tables)


class DecodeGraphs:
    """The captured sizes, and which batches they take."""

    def __init__(self, graphs: Sequence[DecodeGraph], *, is_padding_enabled: bool) -> None:
        self._graphs = sorted(graphs, key=lambda graph: graph.num_rows)
        self._is_padding_enabled = is_padding_enabled

    @property
    def sizes(self) -> list[int]:
        return [graph.num_rows for graph in self._graphs]

    def find(self, batch: Sequence[ScheduledSequence]) -> DecodeGraph | None:
        """The smallest graph for a batch in which every row decodes one token; None: compute it without one."""
        if any(len(row.token_ids) != 1 or row.draft_token_ids or row.sampling is None for row in batch):
            return None
        graph = next((graph for graph in self._graphs if graph.num_rows >= len(batch)), None)
        if graph is None or not graph.fits(batch) or (graph.num_rows != len(batch) and not self._is_padding_enabled):
            return None
        return graph


def capture_on_device(pool: Any) -> Capture:
    """Graphs that share `pool`, from torch.cuda.graph_pool_handle(), keep their working memory in it."""

    def capture(call: Callable[[], torch.Tensor]) -> tuple[Replay, torch.Tensor]:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # Kernels are compiled and workspaces made before anything is recorded.
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            out = call()
        return graph.replay, out

    return capture


def graph_sizes(batch_sizes: Sequence[int], max_batch_size: int) -> tuple[int, ...]:
    """What is captured: the sizes asked for, or 1, 2, 4, 8 and then multiples of 8 that grow with the size, up to
    `max_batch_size`, which is always one of them."""
    if batch_sizes:
        return tuple(sorted(set(batch_sizes)))
    sizes = [1, 2, 4, *range(8, 33, 8), *range(48, 129, 16), *range(160, 257, 32), *range(320, 4097, 64)]
    return tuple(sorted({size for size in sizes if size < max_batch_size} | {max_batch_size}))
