"""The op table in C, for float32 on CPUs. Legend of tensor names: see api.py.

The kernels are in `csrc/`: plain C functions that take raw pointers, called through ctypes, which lets go of the GIL.
This file checks what C cannot, once for each call, because a wrong shape there would read foreign memory.

Rows are independent by construction (see csrc/tile.h), so results are also the same for any number of threads, and
bit for bit the same on AVX2, AVX-512 and NEON, which all have a fused multiply-add.
"""

from __future__ import annotations

import ctypes
import logging
import os
import weakref
from collections import Counter
from collections.abc import Mapping
from ctypes import c_float, c_int, c_int64, c_void_p
from typing import TYPE_CHECKING, Any, Final

import torch

from disaggregated.engine.ops import native_decode, native_kv, native_linear, native_sample, native_step
from disaggregated.engine.ops.api import AttentionBatch, AttentionSpec, LayerPool, Ops, StepProgram
from disaggregated.engine.ops.native_build import library
from disaggregated.engine.ops.native_checks import check_floats, check_indices, check_shape, token_stride
from disaggregated.engine.ops.native_isa import best_isa, runnable_isas
from disaggregated.engine.ops.native_kv import attention_numbers, batch_places, kv_pool, unsound_row
from disaggregated.engine.ops.native_linear import PackedLinear, Quantization
from disaggregated.native_build import NativeUnavailable, loaded

if TYPE_CHECKING:
    from disaggregated.engine.models.decoder import DecoderShape, DecoderWeights

log = logging.getLogger(__name__)

MAX_HEAD_DIM: Final = native_kv.MAX_HEAD_DIM
KV_DTYPES: Final = native_kv.KV_DTYPES

_SIGNATURES: Final[dict[str, tuple[Any, list[Any]]]] = {
    "team_start": (c_void_p, [c_int]),
    "team_stop": (None, [c_void_p]),
    **native_linear.SIGNATURES,
    **native_sample.SIGNATURES,
    "rms_norm": (None, [c_void_p] * 2 + [c_int64] * 4 + [c_void_p, c_float, c_void_p]),
    "silu_mul": (None, [c_void_p] * 2 + [c_int64] * 2 + [c_void_p]),
    "gelu_mul": (None, [c_void_p] * 2 + [c_int64] * 2 + [c_void_p]),
    "rope": (c_int64, [c_void_p] + [c_int64] * 4 + [c_void_p] * 2 + [c_int64, c_void_p]),
    **native_kv.SIGNATURES,
    **native_step.SIGNATURES,
    **native_decode.SIGNATURES,
}
"""Return type and arguments of each function of the library; csrc/ says what they mean."""


def load(
    num_threads: int,
    isa: str | None = None,
    *,
    quantization: Quantization = "none",
    may_be_narrow: bool | None = None,
) -> Ops | None:
    """The native op table, or None, with the reason logged, when this machine has none.

    `quantization` is of all linears that are not asked to be exact.
    `isa` is one of `native_isa.INSTRUCTION_SETS`; by default $DISAGG_NATIVE_ISA, else the best that the CPU can run.
    `may_be_narrow`: weights in float32 are held in fewer bits where that loses none; by default unless
    $DISAGG_DENSE_WEIGHTS is 1. Results are the same.
    The table belongs to one thread at a time: its ops share working memory.
    """
    assert num_threads >= 1, f"num_threads must be at least 1, is {num_threads}"
    if may_be_narrow is None:
        may_be_narrow = os.environ.get("DISAGG_DENSE_WEIGHTS", "0") != "1"
    chosen = isa or os.environ.get("DISAGG_NATIVE_ISA") or best_isa()
    try:
        if chosen not in runnable_isas():
            raise NativeUnavailable(f"this CPU cannot run {chosen}; it can run {', '.join(runnable_isas())}")
        return NativeOps(_open(chosen), chosen, num_threads, quantization, may_be_narrow=may_be_narrow)
    except NativeUnavailable as error:
        log.warning("native_kernels_unavailable: %s", error)
        return None


def _open(isa: str) -> ctypes.CDLL:
    return loaded(library(isa), _SIGNATURES)


class NativeOps:
    """Implements `Ops`. Tensors are float32, on the CPU and contiguous, but q, k, v and the input of rms_norm may be
    slices of a wider tensor's last dimension: their tokens may lie any stride apart. head_dim is a multiple of 16 up
    to 256; block_size is any, and multiples of 8 are fastest."""

    def __init__(
        self, kernels: ctypes.CDLL, isa: str, num_threads: int, quantization: Quantization, *, may_be_narrow: bool
    ) -> None:
        self.name = f"native-{isa}" if quantization == "none" else f"native-{quantization}-{isa}"
        self._quantization: Quantization = quantization
        self.may_be_narrow = may_be_narrow
        self._linear_bytes: Counter[str] = Counter()
        self.linear_bytes: Mapping[str, int] = self._linear_bytes
        self._kernels = kernels
        self._team = kernels.team_start(num_threads)
        if not self._team:
            raise NativeUnavailable("no memory for the threads' book-keeping")
        weakref.finalize(self, kernels.team_stop, self._team)

    def prepare_linear(
        self, weight_MK: torch.Tensor, bias_M: torch.Tensor | None, *, exact: bool = False
    ) -> PackedLinear:
        quantization: Quantization = "none" if exact else self._quantization
        packed = native_linear.prepare(self._kernels, weight_MK, bias_M, quantization, may_be_narrow=self.may_be_narrow)
        self._linear_bytes[packed.form] += packed.num_bytes
        return packed

    def linear(self, x_TK: torch.Tensor, weight: PackedLinear) -> torch.Tensor:
        return native_linear.linear(self._kernels, self._team, x_TK, weight)

    def embedding(self, token_ids_T: torch.Tensor, table_VH: torch.Tensor) -> torch.Tensor:
        return native_sample.embedding(self._kernels, self._team, token_ids_T, table_VH)

    def rms_norm(self, x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
        width = x_TH.shape[-1]
        check_floats(weight_H)
        check_shape(weight_H, (width,))
        if x_TH.dim() == 3:
            (num_tokens, rows_of_token, _), stride = x_TH.shape, token_stride(x_TH)
        else:
            check_floats(x_TH)
            num_tokens, rows_of_token, stride = x_TH.numel() // width, 1, width
        out_TH = x_TH.new_empty(x_TH.shape)
        self._kernels.rms_norm(
            self._team, x_TH.data_ptr(), stride, num_tokens, rows_of_token, width, weight_H.data_ptr(), eps,
            out_TH.data_ptr(),
        )  # fmt: skip
        return out_TH

    def silu_mul(self, gate_up_TF2: torch.Tensor) -> torch.Tensor:
        return self._gated(self._kernels.silu_mul, gate_up_TF2)

    def gelu_mul(self, gate_up_TF2: torch.Tensor) -> torch.Tensor:
        return self._gated(self._kernels.gelu_mul, gate_up_TF2)

    def rope(self, x_TND: torch.Tensor, cos_PD: torch.Tensor, sin_PD: torch.Tensor, positions_T: torch.Tensor) -> None:
        num_tokens, num_heads, head_dim = x_TND.shape
        assert head_dim % 2 == 0, f"head_dim {head_dim} has no halves"
        for table in (cos_PD, sin_PD):
            check_floats(table)
            check_shape(table, (len(cos_PD), head_dim // 2))
        check_indices(positions_T, torch.int64, (num_tokens,))
        wrong = self._kernels.rope(
            x_TND.data_ptr(), token_stride(x_TND), num_tokens, num_heads, head_dim, cos_PD.data_ptr(),
            sin_PD.data_ptr(), len(cos_PD), positions_T.data_ptr(),
        )  # fmt: skip
        assert wrong < 0, f"token {wrong} is at position {positions_T[wrong]}, the tables have {len(cos_PD)}"

    def store_kv(
        self, key_TGD: torch.Tensor, value_TGD: torch.Tensor | None, pool: LayerPool, slots_T: torch.Tensor
    ) -> None:
        native_pool = kv_pool(pool)
        num_tokens = len(key_TGD)
        assert value_TGD is not None, "these kernels' pools have keys and values"
        for kv in (key_TGD, value_TGD):
            check_shape(kv, (num_tokens, native_pool.num_kv_heads, native_pool.head_dim))
        check_indices(slots_T, torch.int64, (num_tokens,))
        wrong = self._kernels.store_kv(
            key_TGD.data_ptr(), token_stride(key_TGD), value_TGD.data_ptr(), token_stride(value_TGD), native_pool,
            slots_T.data_ptr(), num_tokens,
        )  # fmt: skip
        assert wrong < 0, f"token {wrong} goes to slot {slots_T[wrong]}, the pool has {native_pool.num_blocks} blocks"

    def paged_attention(
        self, q_TND: torch.Tensor, pool: LayerPool, batch: AttentionBatch, spec: AttentionSpec
    ) -> torch.Tensor:
        num_tokens, num_heads, head_dim = q_TND.shape
        native_pool, places = kv_pool(pool), batch_places(batch, num_tokens)
        numbers = attention_numbers(spec, num_heads, native_pool.num_kv_heads, head_dim)
        assert native_pool.head_dim == head_dim, f"head_dim {head_dim}, the pool's is {native_pool.head_dim}"
        out_TND = q_TND.new_empty(num_tokens, num_heads, head_dim)
        wrong = self._kernels.paged_attention(
            self._team, q_TND.data_ptr(), token_stride(q_TND), native_pool, places, numbers, out_TND.data_ptr()
        )
        assert wrong < 0, unsound_row(batch, wrong, num_tokens, native_pool.num_blocks)
        return out_TND

    def argmax(self, logits_RV: torch.Tensor) -> torch.Tensor:
        return native_sample.argmax(self._kernels, self._team, logits_RV)

    def top_k(self, values_RV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        return native_sample.top_k(self._kernels, self._team, values_RV, k)

    def step_program(self, shape: DecoderShape, weights: DecoderWeights) -> StepProgram | None:
        return native_step.step_program(self._kernels, self._team, self, shape, weights)

    def _gated(self, kernel: Any, gate_up_TF2: torch.Tensor) -> torch.Tensor:
        num_tokens, width = gate_up_TF2.shape[0], gate_up_TF2.shape[1] // 2
        check_floats(gate_up_TF2)
        check_shape(gate_up_TF2, (num_tokens, 2 * width))
        out_TF = gate_up_TF2.new_empty(num_tokens, width)
        kernel(self._team, gate_up_TF2.data_ptr(), num_tokens, width, out_TF.data_ptr())
        return out_TF
