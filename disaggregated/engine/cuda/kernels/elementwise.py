"""Norms, gates, rope and the writing of keys and values. One program a token, or a token's head.

Legend as in `ops/api.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from disaggregated.engine.cuda.kernels import EXACT
from disaggregated.engine.ops.api import LayerPool
from disaggregated.engine.ops.quantise import Q_MAX


def _launch(width: int) -> dict[str, Any]:
    """By the width of a row alone: the number of warps decides the order of a sum."""
    return {**EXACT, "num_warps": 4 if width <= 2048 else 8}


@triton.jit
def _rms_norm(x, added, weight, out, summed, width, eps, BLOCK: tl.constexpr, HAS_ADDED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, BLOCK)
    is_here = column < width
    value = tl.load(x + row + column, mask=is_here, other=0.0)
    if HAS_ADDED:
        # Rounded to the model's dtype before it is normed, as a sum of its own would be.
        value = (value.to(tl.float32) + tl.load(added + row + column, mask=is_here, other=0.0).to(tl.float32)).to(
            value.dtype
        )
        tl.store(summed + row + column, value, mask=is_here)
    wide = value.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, 0) / width + eps)
    normed = (wide * scale).to(value.dtype).to(tl.float32) * tl.load(weight + column, mask=is_here, other=0.0).to(
        tl.float32
    )
    tl.store(out + row + column, normed.to(value.dtype), mask=is_here)


def rms_norm(x: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """Over the last dimension of a contiguous tensor."""
    width = x.shape[-1]
    out = torch.empty_like(x)
    if rows := x.numel() // width:
        block = triton.next_power_of_2(width)
        _rms_norm[(rows,)](x, x, weight_H, out, out, width, eps, BLOCK=block, HAS_ADDED=False, **_launch(width))
    return out


def add_rms_norm(
    x_TH: torch.Tensor, added_TH: torch.Tensor, weight_H: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + added, its norm), with the bits that the two ops have apart."""
    width = x_TH.shape[-1]
    summed, out = torch.empty_like(x_TH), torch.empty_like(x_TH)
    if rows := x_TH.shape[0]:
        block = triton.next_power_of_2(width)
        _rms_norm[(rows,)](
            x_TH, added_TH, weight_H, out, summed, width, eps, BLOCK=block, HAS_ADDED=True, **_launch(width)
        )
    return summed, out


@triton.jit
def _gated(gate_up, out, width, BLOCK: tl.constexpr, IS_GELU: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_here = column < width
    raw = tl.load(gate_up + row * 2 * width + column, mask=is_here, other=0.0)
    gate = raw.to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=is_here, other=0.0).to(tl.float32)
    if IS_GELU:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        gated = 0.5 * gate * (2.0 - 2.0 / (tl.exp(2.0 * inner) + 1.0))
    else:
        gated = gate / (1.0 + tl.exp(-gate))
    tl.store(out + row * width + column, (gated * up).to(raw.dtype), mask=is_here)


def gated(gate_up_TF2: torch.Tensor, *, is_gelu: bool) -> torch.Tensor:
    """(T, F) = activation(first half) * second half."""
    rows, width = gate_up_TF2.shape[0], gate_up_TF2.shape[1] // 2
    out = gate_up_TF2.new_empty(rows, width)
    if rows:
        _gated[(rows, triton.cdiv(width, 1024))](gate_up_TF2, out, width, BLOCK=1024, IS_GELU=is_gelu, **_launch(1024))
    return out


@triton.jit
def _turned(x, cos, sin, position, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Both halves of one head, rotated and rounded to the dtype of `x`."""
    column = tl.arange(0, BLOCK)
    is_here = column < HALF
    raw = tl.load(x + column, mask=is_here, other=0.0)
    first = raw.to(tl.float32)
    second = tl.load(x + HALF + column, mask=is_here, other=0.0).to(tl.float32)
    c = tl.load(cos + position * HALF + column, mask=is_here, other=0.0)
    s = tl.load(sin + position * HALF + column, mask=is_here, other=0.0)
    return (first * c - second * s).to(raw.dtype), (second * c + first * s).to(raw.dtype)


@triton.jit(do_not_specialize=["positions"])
def _rope(x, cos, sin, positions, token_stride, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    head = x + token * token_stride + tl.program_id(1) * HEAD_DIM
    first, second = _turned(head, cos, sin, tl.load(positions + token), HEAD_DIM // 2, BLOCK)
    column = tl.arange(0, BLOCK)
    is_here = column < HEAD_DIM // 2
    tl.debug_barrier()  # Every thread has read its part of the head before any writes over it.
    tl.store(head + column, first, mask=is_here)
    tl.store(head + HEAD_DIM // 2 + column, second, mask=is_here)


def rope(x_TND: torch.Tensor, cos_PD: torch.Tensor, sin_PD: torch.Tensor, positions_T: torch.Tensor) -> None:
    """In place. Tokens of `x_TND` may lie any stride apart; a token's heads are contiguous."""
    num_tokens, num_heads, head_dim = x_TND.shape
    assert x_TND.stride()[1:] == (head_dim, 1), f"strides {x_TND.stride()}"
    if num_tokens:
        block = triton.next_power_of_2(head_dim // 2)
        _rope[(num_tokens, num_heads)](
            x_TND, cos_PD, sin_PD, positions_T, x_TND.stride(0), HEAD_DIM=head_dim, BLOCK=block, **EXACT, num_warps=1
        )


@triton.jit
def _is_not_finite(x):
    return (tl.abs(x) < float("inf")).to(tl.int32) ^ 1


@triton.jit
def _factor_and_scale(largest, is_broken, LARGEST: tl.constexpr):
    """The rule of `ops/quantise.py`: a row of next to nothing becomes zeros, one with a NaN has the scale NaN."""
    smallest: tl.constexpr = 1e-35 if LARGEST > 127.0 else 1e-36
    is_usable = (largest >= smallest) & (is_broken == 0)
    limit = largest * 0.0 + LARGEST
    factor = tl.where(is_usable, tl.div_rn(limit, largest), 0.0)
    scale = tl.where(is_usable, tl.div_rn(largest, limit), tl.where(is_broken == 0, 0.0, float("nan")))
    return factor, scale


@triton.jit
def _quantised(x, dtype: tl.constexpr, LARGEST: tl.constexpr):
    if dtype == tl.int8:
        # Adding and taking away 1.5 * 2^23 rounds to the nearest whole number, halves to even.
        return ((x + 12582912.0) - 12582912.0).to(dtype)
    return tl.minimum(tl.maximum(x, -LARGEST), LARGEST).to(dtype)


@triton.jit
def _write_head(first, second, plane, offset, scale_at, HALF: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr):
    """Store the two halves of a token's head at `plane + offset`, and its scale if the pool is quantised."""
    column = tl.arange(0, BLOCK)
    is_here = column < HALF
    dtype = plane.dtype.element_ty
    if LARGEST > 0:
        low, high = first.to(tl.float32), second.to(tl.float32)
        largest = tl.max(tl.maximum(tl.abs(low), tl.abs(high)), 0)
        factor, scale = _factor_and_scale(largest, tl.max(_is_not_finite(low) | _is_not_finite(high), 0), LARGEST)
        tl.store(scale_at, scale)
        first, second = _quantised(low * factor, dtype, LARGEST), _quantised(high * factor, dtype, LARGEST)
    tl.store(plane + offset + column, first.to(dtype), mask=is_here)
    tl.store(plane + offset + HALF + column, second.to(dtype), mask=is_here)


@triton.jit
def _head_halves(x, HALF: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    is_here = column < HALF
    return tl.load(x + column, mask=is_here, other=0.0), tl.load(x + HALF + column, mask=is_here, other=0.0)


@triton.jit(do_not_specialize=["slots", "positions"])
def _store_kv(
    q, key, value, cos, sin, positions, slots, pool, scales,
    q_stride, key_stride, value_stride, block_stride, scale_stride,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, NUM_PLANES: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr, HAS_ROPE: tl.constexpr,
):  # fmt: skip
    """Program (t, i): head i of token t, of its key heads, then its value heads, then, with rope, its query heads."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    HALF: tl.constexpr = HEAD_DIM // 2
    if part >= NUM_PLANES * NUM_KV_HEADS:
        head = q + token * q_stride + (part - NUM_PLANES * NUM_KV_HEADS) * HEAD_DIM
        first, second = _turned(head, cos, sin, tl.load(positions + token), HALF, BLOCK)
        column = tl.arange(0, BLOCK)
        tl.debug_barrier()  # As in _rope.
        tl.store(head + column, first, mask=column < HALF)
        tl.store(head + HALF + column, second, mask=column < HALF)
    else:
        slot = tl.load(slots + token)
        block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
        place = part * BLOCK_SIZE + offset
        plane = pool + block * block_stride
        scale_at = scales + block * scale_stride + place
        if part < NUM_KV_HEADS:
            head = key + token * key_stride + part * HEAD_DIM
            if HAS_ROPE:
                first, second = _turned(head, cos, sin, tl.load(positions + token), HALF, BLOCK)
            else:
                first, second = _head_halves(head, HALF, BLOCK)
            _write_head(first, second, plane, place * HEAD_DIM, scale_at, HALF, BLOCK, LARGEST)
        else:
            head = value + token * value_stride + (part - NUM_KV_HEADS) * HEAD_DIM
            first, second = _head_halves(head, HALF, BLOCK)
            _write_head(first, second, plane, place * HEAD_DIM, scale_at, HALF, BLOCK, LARGEST)


def store_kv(key_TGD: torch.Tensor, value_TGD: torch.Tensor | None, pool: LayerPool, slots_T: torch.Tensor) -> None:
    """Write each token's key, and value where the pool has a second plane, into its slot."""
    _launch_store(key_TGD[:, :0], key_TGD, value_TGD, pool, slots_T, None)


def rope_and_store(
    q_TND: torch.Tensor,
    key_TGD: torch.Tensor,
    value_TGD: torch.Tensor,
    pool: LayerPool,
    slots_T: torch.Tensor,
    rope: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Rotate `q_TND` in place, and write rotated keys, and values, into their slots. `rope`: cos, sin, positions.

    The keys themselves stay as they are. Tokens of the three may lie any stride apart.
    """
    _launch_store(q_TND, key_TGD, value_TGD, pool, slots_T, rope)


def _launch_store(
    q_TND: torch.Tensor,
    key_TGD: torch.Tensor,
    value_TGD: torch.Tensor | None,
    pool: LayerPool,
    slots_T: torch.Tensor,
    rope: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
) -> None:
    values, scales = pool.values, pool.scales
    _, num_planes, num_kv_heads, block_size, head_dim = values.shape
    num_tokens, num_heads = q_TND.shape[:2]
    assert key_TGD.shape == (num_tokens, num_kv_heads, head_dim), f"keys are {tuple(key_TGD.shape)}"
    assert (value_TGD is None) == (num_planes == 1), f"{num_planes} planes"
    for heads in (q_TND, key_TGD, value_TGD):
        assert heads is None or heads.numel() == 0 or heads.stride()[1:] == (head_dim, 1), "heads are not contiguous"
    value_TGD = key_TGD if value_TGD is None else value_TGD
    cos_PD, sin_PD, positions_T = rope or (values, values, slots_T)
    if num_tokens == 0:
        return
    _store_kv[(num_tokens, num_planes * num_kv_heads + num_heads)](
        q_TND, key_TGD, value_TGD, cos_PD, sin_PD, positions_T, slots_T,
        values, values if scales is None else scales,
        q_TND.stride(0), key_TGD.stride(0), value_TGD.stride(0),
        values.stride(0), 0 if scales is None else scales.stride(0),
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, NUM_PLANES=num_planes, BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim, BLOCK=triton.next_power_of_2(head_dim // 2),
        LARGEST=0.0 if scales is None else Q_MAX[values.dtype], HAS_ROPE=rope is not None,
        **EXACT, num_warps=1,
    )  # fmt: skip
