"""Another op table with the attention of the torch reference.

For what native attention does not know: pools of latents, odd head sizes, some dtypes of KV. Linears, norms and the
rest, which is most of the time, stay what they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from disaggregated.engine.ops.api import Ops, StepProgram
from disaggregated.engine.ops.reference import ReferenceOps

if TYPE_CHECKING:
    from disaggregated.engine.models.decoder import DecoderShape, DecoderWeights


class WithTorchAttention:
    """Implements `Ops` for float32, like the table that it is made of."""

    def __init__(self, ops: Ops) -> None:
        kernels, _, isa = ops.name.rpartition("-")
        self.name: str = f"{kernels}+torch-attention-{isa}"
        self.linear_bytes = ops.linear_bytes
        reference: Ops = ReferenceOps()
        self.store_kv = reference.store_kv
        self.paged_attention = reference.paged_attention
        self.prepare_linear = ops.prepare_linear
        self.linear = ops.linear
        self.embedding = ops.embedding
        self.rms_norm = ops.rms_norm
        self.silu_mul = ops.silu_mul
        self.gelu_mul = ops.gelu_mul
        self.rope = ops.rope
        self.argmax = ops.argmax
        self.top_k = ops.top_k

    def step_program(self, shape: DecoderShape, weights: DecoderWeights) -> StepProgram | None:
        return None
