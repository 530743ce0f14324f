"""FlashInfer's paged decode behind our attention op, where `attn_backend: flashinfer` asks for it.

Our pool is what FlashInfer calls HND with keys and values in one page: `(blocks, 2, kv heads, block size, head size)`.
Its work is planned on the host once a step, and run once a layer:

    plan   where each sequence's blocks are and how the work is dealt out; one a kind of layer (window, cap, scale)
    run    the kernel, over what the plan left in buffers on the device

A CUDA graph records the runs of one batch. So its plans have buffers of their own that stay, and are made anew before
each replay. A plan writes to pinned memory that the copy behind the plan before may still be read from: its event is
waited for, which in practice has passed.

The kernel deals keys out by what is in the batch, so a token's bits depend on it: this is for the fast mode alone.
What it does not know (prompts, drafts, quantised pools, latents, unusual heads) goes to our own kernel.

Legend as in `ops/api.py`.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import logging
import subprocess
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import torch

from disaggregated.engine.ops.api import AttentionBatch, AttentionSpec, LayerPool
from disaggregated.engine.upload import to_device

log = logging.getLogger(__name__)

WORKSPACE_BYTES: Final = 128 << 20
"""Parts of sums that are split over keys; what FlashInfer advises."""
HEAD_DIMS: Final = (64, 128, 256)
"""For which its decode kernels are instantiated."""
DTYPES: Final = (torch.float16, torch.bfloat16)
CUDA_CORE_GROUP_MAX: Final = 4
"""Query heads a key head, up to which the kernel without tensor cores is the faster one, by its authors."""


class Wrapper(Protocol):
    """As much as we use of `flashinfer.BatchDecodeWithPagedKVCacheWrapper`."""

    def plan(self, *pages_and_sizes: Any, **options: Any) -> None:
        """indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size."""

    def run(self, q: torch.Tensor, paged_kv_cache: torch.Tensor) -> torch.Tensor: ...


@dataclasses.dataclass(frozen=True, slots=True)
class _Kind:
    """What a plan is made for, beside the batch."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    spec: AttentionSpec


@dataclasses.dataclass(frozen=True, slots=True)
class Pages:
    """The blocks of a batch in which every row decodes one token, which is in its last block already."""

    indptr: torch.Tensor
    """(R + 1) int32, on the host: row r has the pages `[indptr[r], indptr[r + 1])` of `indices`."""
    indices: torch.Tensor
    """int32, on the device."""
    last_page_len: torch.Tensor
    """(R) int32, on the host, 1 … block size."""


class _Planned:
    """A wrapper, and when the copy of its last plan has gone."""

    def __init__(self, wrapper: Wrapper, kind: _Kind) -> None:
        self.wrapper = wrapper
        self._kind = kind
        self._copied: torch.cuda.Event | None = None

    def plan(self, pages: Pages) -> None:
        kind, spec = self._kind, self._kind.spec
        if self._copied is not None:
            self._copied.synchronize()
        self.wrapper.plan(
            pages.indptr,
            pages.indices,
            pages.last_page_len,
            kind.num_heads,
            kind.num_kv_heads,
            kind.head_dim,
            kind.block_size,
            pos_encoding_mode="NONE",
            window_left=-1 if spec.window is None else spec.window - 1,
            logits_soft_cap=spec.softcap or 0.0,
            q_data_type=kind.dtype,
            kv_data_type=kind.dtype,
            sm_scale=spec.scale,
        )
        if pages.indices.device.type == "cuda":
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()


class _Batch:
    """The plans of one batch: of a graph, whose places stay, or of whatever is computed without one.

    Invariant: a kind in `_fresh` was planned with the pages of now.
    """

    def __init__(self, make: Callable[[_Kind], Wrapper], *, is_fixed: bool) -> None:
        """`make` gives a wrapper for a kind."""
        self._make = make
        self._is_fixed = is_fixed
        self._pages: Pages | None = None
        self._planned: dict[_Kind, _Planned] = {}
        self._fresh: set[_Kind] = set()

    @property
    def is_used(self) -> bool:
        return bool(self._planned)

    def update(self, pages: Pages) -> None:
        """Plans of a graph are made at once, since nobody asks for them when it is replayed."""
        self._pages = pages
        self._fresh.clear()
        if self._is_fixed:
            for kind in self._planned:
                self._plan(kind)

    def wrapper(self, kind: _Kind) -> Wrapper:
        if kind not in self._planned:
            self._planned[kind] = _Planned(self._make(kind), kind)
        if kind not in self._fresh:
            self._plan(kind)
        return self._planned[kind].wrapper

    def forget(self, kind: _Kind) -> None:
        self._planned.pop(kind, None)

    def _plan(self, kind: _Kind) -> None:
        assert self._pages is not None, "a plan without pages"
        self._planned[kind].plan(self._pages)
        self._fresh.add(kind)


class FlashInferDecode:
    """Belongs to the engine's thread."""

    def __init__(self, wrapper_class: Any, device: torch.device) -> None:
        """`wrapper_class` makes a `Wrapper`."""
        self._wrapper_class = wrapper_class
        self._device = device
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)  # Zero at its first use.
        self._free = _Batch(self._make, is_fixed=False)
        self._free_batch: AttentionBatch | None = None
        self._fixed: dict[int, tuple[AttentionBatch, _Batch]] = {}
        """By identity of a graph's batch, which is kept so that no other has it."""
        self._kernels: dict[_Kind, bool] = {}
        """Whether FlashInfer has one, of each kind that was asked for."""

    def prepare(
        self, batch: AttentionBatch, context_lens: Sequence[int], tables: npt.NDArray[np.int32], *, block_size: int
    ) -> None:
        """Before a graph over `batch` is captured, and before each replay: its rows now have these contexts, the step's
        own token among them, in the blocks that `tables`, (R, width), names."""
        if id(batch) not in self._fixed:
            self._fixed[id(batch)] = (batch, self._fixed_batch(*tables.shape))
        elif not self._fixed[id(batch)][1].is_used:  # It was captured without us.
            return
        _, planned = self._fixed[id(batch)]
        lengths = np.asarray(context_lens, dtype=np.int64)
        counts = -(-lengths // block_size)
        indices = np.concatenate([table[:count] for table, count in zip(tables, counts, strict=True)])
        planned.update(_pages(lengths, counts, block_size, to_device(indices, self._device)))

    def attend(
        self, q_TND: torch.Tensor, pool: LayerPool, batch: AttentionBatch, spec: AttentionSpec
    ) -> torch.Tensor | None:
        """(T, N, D) as `Ops.paged_attention`; None for what FlashInfer's decode does not compute."""
        if unsupported(q_TND, pool, spec):
            return None
        planned = self._plans_of(batch, pool.values.shape[3])
        if planned is None:
            return None
        _, num_heads, head_dim = q_TND.shape
        _, _, num_kv_heads, block_size, _ = pool.values.shape
        kind = _Kind(num_heads, num_kv_heads, head_dim, block_size, q_TND.dtype, spec)
        if not self._has_kernel(kind, planned):
            return None
        return planned.wrapper(kind).run(q_TND.contiguous(), pool.values)

    def _has_kernel(self, kind: _Kind, planned: _Batch) -> bool:
        """Found out by its first plan, which compiles the kernel where no wheel brought it: at the server's start."""
        if kind not in self._kernels:
            try:
                planned.wrapper(kind)
                self._kernels[kind] = True
            except (OSError, RuntimeError, subprocess.SubprocessError) as error:
                log.warning("flashinfer_not_used: no kernel for %s, heads of %s: %s", kind.dtype, kind.head_dim, error)
                planned.forget(kind)
                self._kernels[kind] = False
        return self._kernels[kind]

    def _plans_of(self, batch: AttentionBatch, block_size: int) -> _Batch | None:
        """None where a row has more than its next token."""
        if id(batch) in self._fixed:
            return self._fixed[id(batch)][1]
        if batch.rows is None or any(num_tokens != 1 for _, num_tokens in batch.rows):
            return None
        if self._free_batch is not batch:
            self._free_batch = batch
            lengths = np.array([first + 1 for first, _ in batch.rows], dtype=np.int64)
            counts = -(-lengths // block_size)
            width = batch.block_tables.shape[1]
            places = np.concatenate([row * width + np.arange(count) for row, count in enumerate(counts)])
            indices = batch.block_tables.reshape(-1).index_select(0, to_device(places, self._device))
            self._free.update(_pages(lengths, counts, block_size, indices))
        return self._free

    def _fixed_batch(self, num_rows: int, width: int) -> _Batch:
        places = {
            "paged_kv_indptr_buffer": torch.zeros(num_rows + 1, dtype=torch.int32, device=self._device),
            "paged_kv_indices_buffer": torch.zeros(num_rows * width, dtype=torch.int32, device=self._device),
            "paged_kv_last_page_len_buffer": torch.zeros(num_rows, dtype=torch.int32, device=self._device),
        }
        return _Batch(lambda kind: self._make(kind, use_cuda_graph=True, **places), is_fixed=True)

    def _make(self, kind: _Kind, **options: Any) -> Wrapper:
        wrapper: Wrapper = self._wrapper_class(
            self._workspace,
            "HND",
            use_tensor_cores=kind.num_heads // kind.num_kv_heads > CUDA_CORE_GROUP_MAX,
            backend="fa2",
            **options,
        )
        return wrapper


def unsupported(q_TND: torch.Tensor, pool: LayerPool, spec: AttentionSpec) -> str | None:
    """Why FlashInfer's decode cannot serve a layer, in words."""
    _, num_planes, _, _, head_dim = pool.values.shape
    if num_planes != 2 or spec.latent_value_dim is not None:
        return "it attends to latents"
    if pool.scales is not None:
        return "its pool is quantised, with a scale for each token and head"
    if q_TND.dtype not in DTYPES or pool.values.dtype is not q_TND.dtype:
        return f"it computes in {q_TND.dtype} over {pool.values.dtype}"
    return None if head_dim in HEAD_DIMS else f"its heads have {head_dim} numbers"


def _pages(
    lengths: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], block_size: int, indices: torch.Tensor
) -> Pages:
    indptr = np.zeros(len(counts) + 1, dtype=np.int32)
    np.cumsum(counts, out=indptr[1:])
    last = ((lengths - 1) % block_size + 1).astype(np.int32)
    return Pages(torch.from_numpy(indptr), indices, torch.from_numpy(last))


def missing() -> str | None:
    """What this process lacks; None when nothing."""
    if importlib.util.find_spec("flashinfer") is None:
        return "it needs the flashinfer-python package: pip install 'disaggregated[flashinfer]'"
    return None


def load(device: torch.device, *, is_deterministic: bool) -> FlashInferDecode | None:
    """None, and a line in the log, where it was asked for and cannot be used."""
    reason = missing()
    if is_deterministic:
        reason = "its sums depend on what else is in a batch, so it needs deterministic: false"
    if reason is None:
        try:
            flashinfer = importlib.import_module("flashinfer")
        except (ImportError, OSError, RuntimeError) as error:  # Built for another torch, or another CUDA.
            reason = f"it cannot be loaded: {error}"
    if reason is not None:
        log.warning("flashinfer_not_used: %s", reason)
        return None
    return FlashInferDecode(flashinfer.BatchDecodeWithPagedKVCacheWrapper, device)
