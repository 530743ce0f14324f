"""FlashInfer's wrapper of paged decode as its documentation has it, computed in torch; it minds what it is given."""

from __future__ import annotations

from typing import Any

import torch


class FakeDecodeWrapper:
    """Of `flashinfer.BatchDecodeWithPagedKVCacheWrapper`: what we use of it, and what would go wrong on a device."""

    made: list[FakeDecodeWrapper] = []  # noqa: RUF012  # In the order of making; whoever looks at it clears it.
    fails = ""
    """What the compiler says; "" while it works."""

    def __init__(  # noqa: PLR0917  # Theirs.
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        paged_kv_last_page_len_buffer: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        assert not float_workspace_buffer[:16].any(), "zero at its first use"
        assert kv_layout == "HND"
        assert backend == "fa2"
        self.use_tensor_cores = use_tensor_cores
        self.num_plans = 0
        self._indptr, self._indices = paged_kv_indptr_buffer, paged_kv_indices_buffer
        self._last_page_len = paged_kv_last_page_len_buffer
        self._is_fixed = use_cuda_graph
        self._options: dict[str, Any] = {}
        self.made.append(self)

    def plan(  # noqa: PLR0917  # Theirs.
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        **options: Any,
    ) -> None:
        if self.fails:
            raise RuntimeError(self.fails)
        known = {"pos_encoding_mode", "window_left", "logits_soft_cap", "q_data_type", "kv_data_type", "sm_scale"}
        assert options.keys() == known
        assert {indptr.dtype, indices.dtype, last_page_len.dtype} == {torch.int32}
        assert len(indices) == int(indptr[-1])
        assert 1 <= int(last_page_len.min()) <= int(last_page_len.max()) <= page_size
        self._sizes = (num_qo_heads, num_kv_heads, head_dim, page_size)
        self._options = options
        self.num_plans += 1
        if not self._is_fixed:
            self._indptr, self._indices, self._last_page_len = indptr, indices, last_page_len
            return
        assert self._indptr is not None
        assert self._indices is not None
        assert self._last_page_len is not None
        assert len(last_page_len) == len(self._last_page_len), "the batch size of a graph is fixed"
        self._indptr.copy_(indptr)
        self._indices[: len(indices)].copy_(indices)
        self._last_page_len.copy_(last_page_len)

    def run(self, q: torch.Tensor, paged_kv_cache: torch.Tensor) -> torch.Tensor:
        assert self._indptr is not None
        assert self._indices is not None
        assert self._last_page_len is not None
        num_qo_heads, num_kv_heads, head_dim, page_size = self._sizes
        assert q.is_contiguous()
        assert q.shape == (len(self._last_page_len), num_qo_heads, head_dim)
        assert paged_kv_cache.shape[1:] == (2, num_kv_heads, page_size, head_dim)
        assert self._options["q_data_type"] is q.dtype
        return torch.stack([self._row(row, q[row].double(), paged_kv_cache) for row in range(len(q))]).to(q.dtype)

    def _row(self, row: int, q_ND: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        assert self._indptr is not None
        assert self._indices is not None
        assert self._last_page_len is not None
        num_qo_heads, num_kv_heads, head_dim, page_size = self._sizes
        first, end = int(self._indptr[row]), int(self._indptr[row + 1])
        length = (end - first - 1) * page_size + int(self._last_page_len[row])
        pages = cache[self._indices[first:end].long()].double()
        keys, values = pages.permute(1, 2, 0, 3, 4).reshape(2, num_kv_heads, -1, head_dim)[:, :, :length]
        group = num_qo_heads // num_kv_heads
        scores = torch.einsum("gnd,gkd->gnk", q_ND.view(num_kv_heads, group, head_dim), keys)
        scores = scores * self._options["sm_scale"]
        if cap := self._options["logits_soft_cap"]:
            scores = cap * torch.tanh(scores / cap)
        if (window_left := self._options["window_left"]) >= 0:
            scores[..., : max(0, length - 1 - window_left)] = -torch.inf
        return torch.einsum("gnk,gkd->gnd", scores.softmax(-1), values).reshape(num_qo_heads, head_dim)
