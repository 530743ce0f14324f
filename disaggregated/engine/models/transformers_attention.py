"""The attention that transformers' models are given: keys and values go into our pool, and are read from there.

The library has a table of attention functions, of which a model calls the one that its config names, once a layer,
with queries, keys and values already rotated. Where the tokens of the running step lie is told by a context variable,
because not every model hands further arguments down to its attention.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch

from disaggregated.engine.layer_progress import LayerProgress
from disaggregated.engine.ops.api import AttentionBatch, AttentionSpec, LayerPool, Ops
from disaggregated.errors import ModelUnavailable

NAME: Final = "disaggregated"
"""In the library's table."""

_PASSED_OVER: Final = frozenset({"position_ids", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k"})
"""Tensors a model may hand to its attention that say nothing more than our own layout of the step."""


@dataclasses.dataclass(slots=True)
class RunningStep:
    """One forward pass."""

    batch: AttentionBatch
    pools: Sequence[LayerPool]
    ops: Ops
    progress: LayerProgress | None = None
    num_layers_done: int = 0
    is_in_order: bool = True
    """The layers attended in the order of their numbers, so far."""

    def layer_is_written(self, layer: int) -> None:
        """No progress is told of a model whose layers come in another order: it could be told of layers not written."""
        self.is_in_order &= layer == self.num_layers_done
        self.num_layers_done += 1
        if self.progress is None or not self.is_in_order:
            return
        if self.num_layers_done % self.progress.every == 0 or self.num_layers_done == len(self.pools):
            self.progress.written(self.num_layers_done)


_running: contextvars.ContextVar[RunningStep] = contextvars.ContextVar("running_step")


@contextlib.contextmanager
def running(step: RunningStep) -> Iterator[None]:
    """Within, `attend` knows where tokens lie. Every layer must have attended when it ends.

    Raises:
        ModelUnavailable: some layers kept no keys and values, so the pool is not all that the model remembers.
    """
    token = _running.set(step)
    try:
        yield
    finally:
        _running.reset(token)
    if step.num_layers_done != len(step.pools):
        raise ModelUnavailable(
            f"{step.num_layers_done} of {len(step.pools)} layers have attention that keeps keys and values in the "
            "usual way; models with other layers cannot be served by model_impl: transformers"
        )


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """The library's signature: (1, N, T, D) queries, (1, G, T, D) keys and values → (1, T, N, D).

    Raises:
        ModelUnavailable: the model asks for another attention than ours.
    """
    step = _running.get()
    layer = _layer_of(module)
    _refuse(module, layer, attention_mask, others, sliding_window)
    pool = step.pools[layer]
    _check_shape(key, value, pool, layer)
    q_TND, k_TGD, v_TGD = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    step.ops.store_kv(k_TGD, v_TGD, pool, step.batch.slots)
    spec = AttentionSpec(
        scale=q_TND.shape[-1] ** -0.5 if scaling is None else float(scaling), window=sliding_window, softcap=softcap
    )
    out_TND = step.ops.paged_attention(q_TND, pool, step.batch, spec)
    step.layer_is_written(layer)
    return out_TND.unsqueeze(0), None


def _layer_of(module: torch.nn.Module) -> int:
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise ModelUnavailable(f"{type(module).__name__} does not say which layer it belongs to")
    return layer


def _refuse(
    module: torch.nn.Module,
    layer: int,
    attention_mask: torch.Tensor | None,
    others: dict[str, Any],
    sliding_window: int | None,
) -> None:
    name = type(module).__name__
    if attention_mask is not None:
        raise ModelUnavailable(f"{name} masks more than what lies ahead, which paged attention does not")
    if others.get("is_causal", getattr(module, "is_causal", True)) is False:
        raise ModelUnavailable(f"{name} looks ahead, which a decoder must not")
    unknown = [key for key, value in others.items() if isinstance(value, torch.Tensor) and key not in _PASSED_OVER]
    if unknown:
        raise ModelUnavailable(
            f"{name} hands {', '.join(unknown)} to its attention, which paged attention does not know"
        )
    types = getattr(getattr(module, "config", None), "layer_types", None)
    if types is not None and types[layer] == "sliding_attention" and sliding_window is None:
        raise ModelUnavailable(f"{name} of layer {layer} has a sliding window that it does not tell its attention")


def _check_shape(key: torch.Tensor, value: torch.Tensor, pool: LayerPool, layer: int) -> None:
    _, _, num_kv_heads, _, head_dim = pool.values.shape
    expected = (num_kv_heads, head_dim)
    for name, x in (("keys", key), ("values", value)):
        found = (x.shape[1], x.shape[3])
        if found != expected:
            raise ModelUnavailable(
                f"layer {layer} has {name} of {found[0]} heads of {found[1]}, and the KV pool has {expected[0]} of "
                f"{expected[1]}: all layers' keys and values must have one shape, that of config.json"
            )
