"""The op table of CUDA devices: Triton kernels, cuBLAS, and a step program that fuses what stands side by side.

In the deterministic mode it keeps the law of the table: every kernel computes a row by itself, and matrix products are
only called with row counts that were measured to agree. In the fast mode a linear's bits depend on the size of its
batch, and so does, now and then, a token.

Importing this module imports Triton; `select.py` does so only where a CUDA device is asked for.

Legend as in `ops/api.py`.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from disaggregated.engine.cuda import flashinfer_decode
from disaggregated.engine.cuda.flashinfer_decode import FlashInferDecode
from disaggregated.engine.cuda.graphs import Prepare
from disaggregated.engine.cuda.kernels import attention, elementwise
from disaggregated.engine.cuda.kernels.quantise import quantise_rows
from disaggregated.engine.cuda.linear import CudaLinear, CudaLinears, ScaledProduct, scaled_product
from disaggregated.engine.ops.api import AttentionBatch, AttentionSpec, LayerPool, StepProgram
from disaggregated.engine.ops.reference_attention import ReferenceAttention

if TYPE_CHECKING:
    from disaggregated.engine.models.decoder import DecoderShape, DecoderWeights
    from disaggregated.engine.precision import Quantization


class CudaOps:
    """Implements `Ops`. Belongs to the engine's thread."""

    def __init__(
        self,
        *,
        quantization: Quantization,
        is_deterministic: bool,
        num_multiprocessors: int,
        chip: str,
        product: ScaledProduct = scaled_product,
        decode: FlashInferDecode | None = None,
    ) -> None:
        """`chip` names the device in the table's name, since another chip adds up in another order. `decode` takes what
        it can of single tokens' attention, in the fast mode only."""
        assert not (is_deterministic and decode), "a decode kernel whose sums depend on the batch"
        assert quantization in ("none", "fp8"), f"weights in {quantization}"
        self.is_deterministic = is_deterministic
        self._num_multiprocessors = num_multiprocessors
        self._words = ["cuda", chip, *([quantization] if quantization != "none" else [])]
        self._linears = CudaLinears(
            is_deterministic=is_deterministic,
            quantise_rows=quantise_rows,
            scaled_product=product,
            to_fp8=quantization == "fp8",
        )
        self._latent_attention = ReferenceAttention()
        self._decode = decode
        self.name = self._named()
        """Final once every linear has been prepared."""
        self.linear_bytes: Mapping[str, int] = {}
        self.is_capturable = False
        """Whether the model's forward pass, once it has been built, can be recorded into a graph."""

    def _named(self) -> str:
        """Of the deterministic mode the name tells the measured row counts too: with others, other bits."""
        if not self.is_deterministic:
            return "-".join([*self._words, "fast"])
        measured = hashlib.sha256(repr(sorted(self._linears.measured.items(), key=repr)).encode()).hexdigest()
        return "-".join([*self._words, measured[:6]])

    def padded_rows(self, num_rows: int) -> int:
        """To how many rows a decode batch is best padded; see `CudaLinears.padded_rows`."""
        return self._linears.padded_rows(num_rows)

    def prepare_linear(
        self, weight_MK: torch.Tensor, bias_M: torch.Tensor | None, *, exact: bool = False
    ) -> CudaLinear:
        prepared = self._linears.prepare(weight_MK, bias_M, exact=exact)
        self.name = self._named()
        return prepared

    def linear(self, x_TK: torch.Tensor, weight: CudaLinear) -> torch.Tensor:
        return self._linears.apply(x_TK, weight)

    def embedding(self, token_ids_T: torch.Tensor, table_VH: torch.Tensor) -> torch.Tensor:
        return table_VH.index_select(0, token_ids_T)

    def rms_norm(self, x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
        return elementwise.rms_norm(x_TH.contiguous(), weight_H, eps)

    def silu_mul(self, gate_up_TF2: torch.Tensor) -> torch.Tensor:
        return elementwise.gated(gate_up_TF2, is_gelu=False)

    def gelu_mul(self, gate_up_TF2: torch.Tensor) -> torch.Tensor:
        return elementwise.gated(gate_up_TF2, is_gelu=True)

    def rope(self, x_TND: torch.Tensor, cos_PD: torch.Tensor, sin_PD: torch.Tensor, positions_T: torch.Tensor) -> None:
        elementwise.rope(x_TND, cos_PD, sin_PD, positions_T)

    def store_kv(
        self, key_TGD: torch.Tensor, value_TGD: torch.Tensor | None, pool: LayerPool, slots_T: torch.Tensor
    ) -> None:
        elementwise.store_kv(key_TGD, value_TGD, pool, slots_T)

    def paged_attention(
        self, q_TND: torch.Tensor, pool: LayerPool, batch: AttentionBatch, spec: AttentionSpec
    ) -> torch.Tensor:
        """Latents (MLA) and unusual heads go through torch's reference, which plans on the host: right, not fast."""
        if self._decode is not None and (attended := self._decode.attend(q_TND, pool, batch, spec)) is not None:
            return attended
        _, num_planes, num_kv_heads, _, head_dim = pool.values.shape
        if num_planes == 1 or attention.unsupported(q_TND.shape[1], num_kv_heads, head_dim):
            return self._latent_attention.attend(q_TND, pool, batch, spec)
        return attention.paged_attention(q_TND, pool, batch, spec, num_multiprocessors=self._num_multiprocessors)

    @property
    def decode_attention(self) -> str:
        """Whose kernel it is, for the log."""
        return "our kernel" if self._decode is None else "FlashInfer, where it can"

    def prepare_decode(self, block_size: int) -> Prepare | None:
        """What a graph of decode steps over a pool of such blocks calls before it runs; None: nothing."""
        return None if self._decode is None else functools.partial(self._decode.prepare, block_size=block_size)

    def argmax(self, logits_RV: torch.Tensor) -> torch.Tensor:
        return logits_RV.argmax(-1)

    def top_k(self, values_RV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        values, ids = values_RV.topk(k)
        return values, ids

    def step_program(self, shape: DecoderShape, weights: DecoderWeights) -> StepProgram | None:
        """For models of grouped attention and gated feed-forward parts; only these can be captured into a graph."""
        from disaggregated.engine.cuda.step_program import FusedStep, can_fuse

        if not can_fuse(shape, weights):
            return None
        self.is_capturable = True
        return FusedStep(self, shape, weights)

    # What the step program fuses; with the bits of the ops above.

    def add_rms_norm(
        self, x_TH: torch.Tensor, added_TH: torch.Tensor, weight_H: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(x + added, the norm of that)."""
        return elementwise.add_rms_norm(x_TH, added_TH, weight_H, eps)

    def rope_and_store(
        self,
        heads: Sequence[torch.Tensor],
        pool: LayerPool,
        batch: AttentionBatch,
        tables: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """`heads`: q, k and v, (T, heads, D). q is rotated in place; rotated keys, and values, go into the pool."""
        q_TND, key_TGD, value_TGD = heads
        rope = (*tables, batch.positions)
        elementwise.rope_and_store(q_TND, key_TGD, value_TGD, pool, batch.slots, rope)


def load(
    device: torch.device, quantization: Quantization, *, is_deterministic: bool, attn_backend: str = "auto"
) -> CudaOps:
    """The table of this device. Sums of bfloat16 products are kept in float32 from here on, process-wide."""
    if device.index:
        torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    properties = torch.cuda.get_device_properties(device)
    wants_flashinfer = attn_backend == "flashinfer"
    return CudaOps(
        quantization=quantization,
        is_deterministic=is_deterministic,
        num_multiprocessors=properties.multi_processor_count,
        chip=f"sm{properties.major}{properties.minor}",
        decode=flashinfer_decode.load(device, is_deterministic=is_deterministic) if wants_flashinfer else None,
    )
