"""A whole forward pass as one call of the C kernels, or a few: the table of layers that `csrc/step.c` walks over.

The table is made once, of raw pointers into the model's weights, which the program keeps alive. It knows layers of
grouped attention and a dense gated feed-forward part, with every option that these have; for any other model there is
no program, and the decoder makes its pass op by op. Both give the same bits. Legend: see api.py.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_float, c_int64, c_void_p
from typing import Any, Final

import torch

from disaggregated.engine.layer_progress import LayerProgress, layer_ranges
from disaggregated.engine.models.attention import GroupedAttention
from disaggregated.engine.models.decoder import DecoderShape, DecoderWeights, LayerWeights
from disaggregated.engine.models.mlp import GatedMlp
from disaggregated.engine.ops.api import AttentionBatch, LayerPool
from disaggregated.engine.ops.native_checks import check_floats, check_indices, check_shape
from disaggregated.engine.ops.native_decode import NativeDecode
from disaggregated.engine.ops.native_kv import (
    AttentionNumbers,
    BatchPlaces,
    KVPool,
    PoolTable,
    attention_numbers,
    batch_places,
    takes_head_dim,
    unsound_row,
)
from disaggregated.engine.ops.native_linear import LinearWeight, PackedLinear

_ACTIVATIONS: Final = {"silu": 0, "gelu": 1}
"""`ACTIVATION_…` of csrc/step.c."""


class _Wrong(enum.IntEnum):
    """What `run_step` returns."""

    NOTHING = 0
    TOKEN_ID = 1
    POSITION = 2
    SLOT = 3
    ROW = 4


class StepLayer(Structure):
    """`step_layer` of csrc/step.c."""

    _fields_ = [
        ("input_norm", c_void_p), ("q_norm", c_void_p), ("k_norm", c_void_p), ("attention_post_norm", c_void_p),
        ("mlp_norm", c_void_p), ("mlp_post_norm", c_void_p),
        ("qkv", LinearWeight), ("out", LinearWeight), ("gate_up", LinearWeight), ("down", LinearWeight),
        ("cos", c_void_p), ("sin", c_void_p), ("num_positions", c_int64), ("activation", c_int64),
        ("attention", AttentionNumbers),
    ]  # fmt: skip


class StepModel(Structure):
    """`step_model` of csrc/step.c."""

    _fields_ = [
        ("embedding", c_void_p), ("vocabulary", c_int64), ("hidden", c_int64), ("num_layers", c_int64),
        ("layers", POINTER(StepLayer)), ("embedding_scale", c_float), ("epsilon", c_float),
    ]  # fmt: skip


class Step(Structure):
    """`step` of csrc/step.c."""

    _fields_ = [
        ("token_ids", c_void_p), ("positions", c_void_p), ("slots", c_void_p), ("places", BatchPlaces),
        ("pools", POINTER(KVPool)), ("to", c_void_p), ("first_layer", c_int64), ("end_layer", c_int64),
    ]  # fmt: skip


SIGNATURES: Final[dict[str, tuple[Any, list[Any]]]] = {
    "run_step": (c_int64, [c_void_p, POINTER(StepModel), POINTER(Step), POINTER(c_int64)]),
}
"""Return type and arguments of each function; csrc/ says what they mean."""


def step_program(
    kernels: ctypes.CDLL, team: int, owner: object, shape: DecoderShape, weights: DecoderWeights
) -> NativeStepProgram | None:
    """None for a model with a part of another kind. `owner` of `team` is kept as long as the program."""
    known = all(type(layer.attention) is GroupedAttention and type(layer.mlp) is GatedMlp for layer in weights.layers)
    if not known or not takes_head_dim(shape.head_dim):
        return None
    return NativeStepProgram(kernels, team, owner, shape, weights)


class NativeStepProgram:
    """Implements `StepProgram`."""

    def __init__(
        self, kernels: ctypes.CDLL, team: int, owner: object, shape: DecoderShape, weights: DecoderWeights
    ) -> None:
        self._run, self._team = kernels.run_step, team
        self._kept_alive = (owner, weights)
        self._shape = shape
        self._hidden = weights.embedding_VH.shape[1]
        self._layers = (StepLayer * len(weights.layers))(
            *(_step_layer(layer, shape, self._hidden) for layer in weights.layers)
        )
        self._model = StepModel(
            embedding=_address(weights.embedding_VH, weights.embedding_VH.shape),
            vocabulary=len(weights.embedding_VH),
            hidden=self._hidden,
            num_layers=len(self._layers),
            layers=self._layers,
            embedding_scale=shape.embedding_scale,
            epsilon=shape.rms_norm_eps,
        )
        self._pools = PoolTable(len(self._layers), shape.num_kv_heads, shape.head_dim)
        self.decode: NativeDecode | None = None
        if shape.final_softcap is None:
            self.decode = NativeDecode(kernels, team, self._model, weights, self._pools)

    def __call__(
        self,
        token_ids_T: torch.Tensor,
        batch: AttentionBatch,
        pools: Sequence[LayerPool],
        progress: LayerProgress | None = None,
    ) -> torch.Tensor:
        num_tokens = len(token_ids_T)
        for indices in (token_ids_T, batch.positions, batch.slots):
            check_indices(indices, torch.int64, (num_tokens,))
        hidden_TH = torch.empty(num_tokens, self._hidden)
        step = Step(
            token_ids=token_ids_T.data_ptr(),
            positions=batch.positions.data_ptr(),
            slots=batch.slots.data_ptr(),
            places=batch_places(batch, num_tokens),
            pools=self._pools.of(pools),
            to=hidden_TH.data_ptr(),
        )
        where = c_int64(-1)
        for step.first_layer, step.end_layer in layer_ranges(len(pools), progress):
            wrong = self._run(self._team, byref(self._model), byref(step), byref(where))
            assert wrong == _Wrong.NOTHING, self._in_words(wrong, where.value, token_ids_T, batch, len(pools[0].values))
            if progress is not None:
                progress.written(step.end_layer)
        return hidden_TH

    def _in_words(
        self, wrong: int, where: int, token_ids_T: torch.Tensor, batch: AttentionBatch, num_blocks: int
    ) -> str:
        match wrong:
            case _Wrong.TOKEN_ID:
                return f"token {where} has id {token_ids_T[where]}, the vocabulary has {self._model.vocabulary}"
            case _Wrong.POSITION:
                num_positions = min(layer.num_positions for layer in self._layers)
                return f"token {where} is at position {batch.positions[where]}, the tables have {num_positions}"
            case _Wrong.SLOT:
                return f"token {where} goes to slot {batch.slots[where]}, the pool has {num_blocks} blocks"
        return unsound_row(batch, where, len(token_ids_T), num_blocks)


def _step_layer(layer: LayerWeights, shape: DecoderShape, hidden: int) -> StepLayer:
    attention, mlp = layer.attention, layer.mlp
    assert isinstance(attention, GroupedAttention)
    assert isinstance(mlp, GatedMlp)
    num_positions, half = len(attention.cos_PD), shape.head_dim // 2
    q_width = shape.num_heads * shape.head_dim
    qkv_width = q_width + 2 * shape.num_kv_heads * shape.head_dim
    width = mlp.down.depth
    return StepLayer(
        input_norm=_address(layer.input_norm, (hidden,)),
        q_norm=_address(attention.q_norm, (shape.head_dim,)),
        k_norm=_address(attention.k_norm, (shape.head_dim,)),
        attention_post_norm=_address(layer.attention_post_norm, (hidden,)),
        mlp_norm=_address(layer.mlp_norm, (hidden,)),
        mlp_post_norm=_address(layer.mlp_post_norm, (hidden,)),
        qkv=_linear(attention.qkv, hidden, qkv_width),
        out=_linear(attention.out, q_width, hidden),
        gate_up=_linear(mlp.gate_up, hidden, 2 * width),
        down=_linear(mlp.down, width, hidden),
        cos=_address(attention.cos_PD, (num_positions, half)),
        sin=_address(attention.sin_PD, (num_positions, half)),
        num_positions=num_positions,
        activation=_ACTIVATIONS[mlp.activation],
        attention=attention_numbers(attention.spec, shape.num_heads, shape.num_kv_heads, shape.head_dim),
    )


def _linear(packed: PackedLinear, depth: int, num_columns: int) -> LinearWeight:
    assert (packed.depth, packed.num_columns) == (depth, num_columns), (
        f"a linear {packed.depth} → {packed.num_columns}, must be {depth} → {num_columns}"
    )
    return packed.weight


def _address(x: torch.Tensor | None, shape: Sequence[int]) -> int | None:
    """None, NULL in C, of what a family does not have."""
    if x is None:
        return None
    check_floats(x)
    check_shape(x, tuple(shape))
    return x.data_ptr()
