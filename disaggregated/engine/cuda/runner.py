"""The model runner of CUDA devices: decode steps as graphs, sampling on the device, the next step launched before this
one's tokens are known.

    host     launch n ── launch n+1 ── tokens of n ── launch n+2 ── tokens of n+1
    device   ├─ step n ─┤├─ step n+1 ─┤├─ step n+2 ─┤

All of it runs in order on the engine thread's current stream, so a step's inputs are in place, and the buffers of the
step before are free, without the host ever asking. The one wait is for the event behind the copy of a step's tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from disaggregated.engine.api import PendingStep, ScheduledSequence
from disaggregated.engine.cuda import step_input
from disaggregated.engine.cuda.graphs import DecodeGraphs
from disaggregated.engine.kv_cache import KVCache
from disaggregated.engine.logit_edits import edits_of
from disaggregated.engine.logprobs import StepLogprobs, step_logprobs
from disaggregated.engine.models.decoder import Model
from disaggregated.engine.ops.api import AttentionBatch
from disaggregated.engine.runner import TorchModelRunner, accepted
from disaggregated.engine.sample_row import sample_rows
from disaggregated.engine.step_layout import step_tensors
from disaggregated.engine.upload import to_device

Sample = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""(logits (R, V), columns (5, R), tokens (R) to write); see `kernels/sampling.py`."""


@dataclasses.dataclass(slots=True)
class LaunchedStep:
    """Implements `PendingStep`."""

    batch: Sequence[ScheduledSequence]
    host_tokens: torch.Tensor
    """Pinned; right once `done` has passed."""
    done: torch.cuda.Event | None
    """Behind everything of this step, its KV too. None: it is done already, as on a CPU."""
    told: StepLogprobs | None = None

    def tokens(self) -> Sequence[Sequence[int]]:
        if self.done is not None:
            self.done.synchronize()
        if self.told is not None:
            self.told.tell()
        sampled = iter(self.host_tokens.tolist())
        return [[] if row.sampling is None else accepted(row.draft_token_ids, sampled) for row in self.batch]


class CudaModelRunner(TorchModelRunner):
    """Implements `OverlappingRunner`. Owned by the engine's thread."""

    def __init__(self, model: Model, kv_cache: KVCache, device: torch.device, *, max_rows: int, sample: Sample) -> None:
        """`max_rows`: sequences in a step at most."""
        super().__init__(model, kv_cache, device)
        self._sample = sample
        self.last_tokens = torch.zeros(max_rows, dtype=torch.int64, device=device)
        """By row of the step launched last: the token it sampled. Of rows that sampled one."""
        self.graphs = DecodeGraphs([], is_padding_enabled=False)
        """Captured after the first steps have run; see `cuda/start.py`."""
        self.graph_steps_total = 0
        self.eager_steps_total = 0

    def execute(self, batch: Sequence[ScheduledSequence]) -> Sequence[Sequence[int]]:
        return self.launch(batch).tokens()

    def launch(self, batch: Sequence[ScheduledSequence]) -> PendingStep:
        assert batch, "an empty batch"
        if self._device.index:
            torch.cuda.set_device(self._device)  # Kernels go to the thread's device, and threads begin at the first.
        told = step_logprobs(batch, self._model.ops, self._to_host)
        with torch.inference_mode():
            graph = self.graphs.find(batch)
            self.graph_steps_total += graph is not None
            self.eager_steps_total += graph is None
            logits = self._without_graph(batch, told) if graph is None else graph.run(batch)
            return self._fetch(batch, self._sampled(logits, batch, told), told)

    def forward_and_logits(self, token_ids_T: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        """(T, V): every token is sampled after, as in a decode step."""
        return self._model.logits(self._model.forward(token_ids_T, batch, self._kv_cache.layers))

    def _without_graph(
        self, batch: Sequence[ScheduledSequence], told: StepLogprobs | None = None
    ) -> torch.Tensor | None:
        """Logits of each sampled position; None where nothing is sampled."""
        token_ids, attention, sampled = step_tensors(batch, self._kv_cache.layout.block_size, self._device)
        followed = step_input.followed_rows(batch)
        if followed.size:
            places, rows = to_device(followed, self._device).unbind(0)
            token_ids = token_ids.index_copy(0, places, self.last_tokens.index_select(0, rows))
        hidden = self._model.forward(token_ids, attention, self._kv_cache.layers)
        if told is not None:
            told.measure_prompts(hidden, self._model.logits)
        return self._model.logits(hidden.index_select(0, sampled)) if len(sampled) else None

    def _sampled(
        self, logits_RV: torch.Tensor | None, batch: Sequence[ScheduledSequence], told: StepLogprobs | None
    ) -> torch.Tensor:
        """(sampled positions) int64 on the device; where the next step may ask for one, it is in `last_tokens` too."""
        if logits_RV is None:
            return torch.empty(0, dtype=torch.int64, device=self._device)
        if told is not None:
            told.keep(logits_RV)
        rows = sample_rows(batch)
        if (edits := edits_of(rows, logits_RV.shape[1])) is not None:
            logits_RV = logits_RV.float()  # Edited as on any other device, where logits are of that precision.
            edits.apply(logits_RV)
        columns = to_device(step_input.sampling_columns(rows), self._device)
        chosen = torch.empty(len(logits_RV), dtype=torch.int64, device=self._device)
        self._sample(logits_RV, columns, chosen)
        if told is not None:
            told.measure(chosen)
        followable = step_input.followable_rows(batch)
        if followable.size:
            index, positions = to_device(followable, self._device).unbind(0)
            self.last_tokens.index_copy_(0, index, chosen.index_select(0, positions))
        return chosen

    def _fetch(
        self, batch: Sequence[ScheduledSequence], chosen: torch.Tensor, told: StepLogprobs | None
    ) -> LaunchedStep:
        host_tokens = self._to_host(chosen)
        if self._device.type != "cuda":
            return LaunchedStep(batch, host_tokens, None, told)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        return LaunchedStep(batch, host_tokens, done, told)

    def _to_host(self, found: torch.Tensor) -> torch.Tensor:
        """Its numbers are right once the step is done."""
        if self._device.type != "cuda":
            return found
        fetched = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
        return fetched.copy_(found, non_blocking=True)
