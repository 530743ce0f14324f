"""One forward pass of a batch of scheduled sequences, from their token ids to the next token of each.

The host lays the step out (`step_layout.py`) and waits for the device once: when the sampled tokens come back. A step
of nothing but decoding takes the model's shorter way, where it has one.

Legend as in `ops/api.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from disaggregated.engine.api import ScheduledSequence
from disaggregated.engine.kv_cache import KVCache
from disaggregated.engine.layer_progress import LayerProgress
from disaggregated.engine.logprobs import StepLogprobs, step_logprobs
from disaggregated.engine.models.decoder import Model
from disaggregated.engine.ops.api import DecodeProgram, DecodeRows
from disaggregated.engine.sample_row import sample_rows
from disaggregated.engine.sampler import sample
from disaggregated.engine.step_layout import step_tensors


class TorchModelRunner:
    """Implements `LayeredRunner` on a CPU, `ModelRunner` elsewhere. Owned by the engine's thread, as are the model's op
    table and the pool."""

    def __init__(self, model: Model, kv_cache: KVCache, device: torch.device) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._device = device

    def execute(self, batch: Sequence[ScheduledSequence]) -> Sequence[Sequence[int]]:
        return self._execute(batch, None)

    def execute_layered(self, batch: Sequence[ScheduledSequence], progress: LayerProgress) -> Sequence[Sequence[int]]:
        assert self._device.type == "cpu", f"what a {self._device} was given is not done when the call returns"
        return self._execute(batch, progress)

    def logits(self, batch: Sequence[ScheduledSequence]) -> torch.Tensor:
        """(positions that are sampled, V), for whoever wants more of them than a token. Writes KV like execute()."""
        with torch.inference_mode():
            logits = self._logits(batch, None, None)
        assert logits is not None, "no row of the batch samples"
        return logits

    def _execute(self, batch: Sequence[ScheduledSequence], progress: LayerProgress | None) -> Sequence[Sequence[int]]:
        if progress is None and (decode := self._model.decode) is not None and all(map(_only_decodes, batch)):
            return self._decode(batch, decode)
        told = step_logprobs(batch, self._model.ops)
        with torch.inference_mode():
            logits = self._logits(batch, progress, told)
            chosen = [] if logits is None else self._chosen(logits, batch, told)
            if told is not None:
                told.tell()
        sampled = iter(chosen)
        return [[] if row.sampling is None else accepted(row.draft_token_ids, sampled) for row in batch]

    def _decode(self, batch: Sequence[ScheduledSequence], decode: DecodeProgram) -> Sequence[Sequence[int]]:
        rows = DecodeRows(
            [row.token_ids[0] for row in batch],
            [row.first_position for row in batch],
            [row.block_table for row in batch],
        )
        if all(map(_takes_likeliest, batch)):
            return [[token] for token in decode.likeliest(rows, self._kv_cache.layers)]
        logits_RV = decode.logits(rows, self._kv_cache.layers)
        with torch.inference_mode():
            return [[token] for token in sample(logits_RV, sample_rows(batch), self._model.ops)]

    def _chosen(
        self, logits_RV: torch.Tensor, batch: Sequence[ScheduledSequence], told: StepLogprobs | None
    ) -> list[int]:
        if told is None:
            return sample(logits_RV, sample_rows(batch), self._model.ops)
        told.keep(logits_RV)
        chosen = sample(logits_RV, sample_rows(batch), self._model.ops)
        told.measure(torch.tensor(chosen))
        return chosen

    def _logits(
        self, batch: Sequence[ScheduledSequence], progress: LayerProgress | None, told: StepLogprobs | None
    ) -> torch.Tensor | None:
        """Logits of the last 1 + drafts positions of each row that samples; None where no row does."""
        assert batch, "an empty batch"
        token_ids, attention, last_tokens = step_tensors(batch, self._kv_cache.layout.block_size, self._device)
        hidden = self._model.forward(token_ids, attention, self._kv_cache.layers, progress)
        if told is not None:
            told.measure_prompts(hidden, self._model.logits)
        if not last_tokens.numel():
            return None
        if last_tokens.numel() < token_ids.numel():  # A step of nothing but decoding samples after each of its tokens.
            hidden = hidden.index_select(0, last_tokens)
        return self._model.logits(hidden)


def _only_decodes(row: ScheduledSequence) -> bool:
    """One token, sampled after, and nothing to be told beside the next one."""
    samples = row.sampling is not None and row.logprobs is None
    return samples and len(row.token_ids) == 1 and not row.draft_token_ids


def _takes_likeliest(row: ScheduledSequence) -> bool:
    assert row.sampling is not None
    return row.sampling.takes_likeliest and not row.forbidden_token_ids and row.masks is None


def accepted(draft_token_ids: Sequence[int], sampled: Iterator[int]) -> list[int]:
    """The tokens of one row, out of those sampled after its last token and after each draft: takes all of these.

    A draft that is the token sampled in its place changed nothing: what is sampled after it counts. The first that is
    not ends the run, and the token sampled in its place is the last one.
    """
    tokens = [next(sampled), *(next(sampled) for _ in draft_token_ids)]
    num_accepted = 0
    while num_accepted < len(draft_token_ids) and draft_token_ids[num_accepted] == tokens[num_accepted]:
        num_accepted += 1
    return tokens[: num_accepted + 1]
