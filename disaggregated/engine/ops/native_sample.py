"""The ends of a step in C: rows of the embedding, and the largest of a row of logits. Legend: see api.py."""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from typing import Any, Final

import torch

from disaggregated.engine.ops.native_checks import check_floats, check_indices

SIGNATURES: Final[dict[str, tuple[Any, list[Any]]]] = {
    "embedding": (c_int64, [c_void_p] * 2 + [c_int64] * 2 + [c_void_p, c_int64, c_void_p]),
    "argmax": (None, [c_void_p] * 2 + [c_int64] * 2 + [c_void_p]),
    "top_k": (None, [c_void_p] * 2 + [c_int64] * 3 + [c_void_p] * 2),
}
"""Return type and arguments of each function; csrc/sample.c says what they mean."""


def embedding(kernels: ctypes.CDLL, team: int, token_ids_T: torch.Tensor, table_VH: torch.Tensor) -> torch.Tensor:
    num_tokens, (num_rows, width) = len(token_ids_T), table_VH.shape
    check_indices(token_ids_T, torch.int64, (num_tokens,))
    check_floats(table_VH)
    out_TH = table_VH.new_empty(num_tokens, width)
    wrong = kernels.embedding(
        team, table_VH.data_ptr(), num_rows, width, token_ids_T.data_ptr(), num_tokens, out_TH.data_ptr()
    )
    assert wrong < 0, f"token {wrong} has the id {token_ids_T[wrong]}, the table has {num_rows} rows"
    return out_TH


def argmax(kernels: ctypes.CDLL, team: int, logits_RV: torch.Tensor) -> torch.Tensor:
    """(R) int64."""
    num_rows, width = logits_RV.shape
    check_floats(logits_RV)
    assert width > 0, "the largest of no numbers"
    ids_R = torch.empty(num_rows, dtype=torch.int64)
    kernels.argmax(team, logits_RV.data_ptr(), num_rows, width, ids_R.data_ptr())
    return ids_R


def top_k(kernels: ctypes.CDLL, team: int, values_RV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, K) float32 and their ids, (R, K) int64."""
    num_rows, width = values_RV.shape
    check_floats(values_RV)
    assert 1 <= k <= width, f"the {k} largest of {width}"
    largest_RK, ids_RK = values_RV.new_empty(num_rows, k), torch.empty(num_rows, k, dtype=torch.int64)
    kernels.top_k(team, values_RV.data_ptr(), num_rows, width, k, largest_RK.data_ptr(), ids_RK.data_ptr())
    return largest_RK, ids_RK
