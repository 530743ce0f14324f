"""Whether two servers may exchange KV: same weights, same numerics.

Weights are told apart by names, shapes and a few kilobytes of every tensor, not by reading gigabytes at start: training
changes all of a tensor, so a sample of each tells one checkpoint from the next.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import xxhash

from disaggregated.engine.ops.native_isa import X86
from disaggregated.errors import ModelUnavailable

NUMERICS_VERSION: Final = 2
"""Of all kernels together. Whoever changes a bit of what one of them computes raises it: servers of two versions of
this program then refuse each other's KV, instead of going on with a token that neither would have given alone."""
SAMPLE_BYTES: Final = 4096
HEADER_BYTES_MAX: Final = 100 << 20
"""The format's own limit."""


def weights_digest(paths: Sequence[Path]) -> str:
    """Of safetensors files, in name order: size, header, and the beginning and the middle of each tensor."""
    digest = xxhash.xxh3_128()
    for path in sorted(paths, key=lambda path: path.name):
        digest.update(path.stat().st_size.to_bytes(8, "little"))
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = file.read(min(header_bytes, HEADER_BYTES_MAX))
            digest.update(header)
            for begin, end in _tensor_ranges(header, path):
                for start in (begin, (begin + end) // 2):
                    file.seek(8 + header_bytes + start)
                    digest.update(file.read(min(SAMPLE_BYTES, end - start)))
    return digest.hexdigest()


def tokenizer_digest(folder: Path) -> str:
    """Of tokenizer.json, byte for byte; "" without one. Equal ids must be equal text on both ends of a transfer."""
    path = folder / "tokenizer.json"
    return xxhash.xxh3_128_hexdigest(path.read_bytes()) if path.is_file() else ""


def numerics_of(ops_name: str) -> str:
    """One name for all op tables that give the same bits.

    The native kernels add up in one order everywhere, so all instruction sets with a fused multiply-add agree; on
    x86-64 the baseline has none.
    """
    kernels, _, isa = ops_name.rpartition("-")
    is_mixed = "+" in ops_name  # Partly torch, which promises nothing of the kind.
    if not kernels.startswith("native") or is_mixed or (isa == "baseline" and platform.machine() in X86):
        return ops_name
    return f"{kernels}-fma"


def fingerprint(weights: str, *numerics: object) -> str:
    """`weights` is a digest or a name of the weights; `numerics` all else that a token's KV depends on."""
    digest = xxhash.xxh3_128(weights.encode())
    for item in numerics:
        digest.update(repr(item).encode() + b"\0")
    return digest.hexdigest()


def _tensor_ranges(header: bytes, path: Path) -> list[tuple[int, int]]:
    """Where each tensor begins and ends, counted from the end of the header."""
    try:
        tensors = {name: tensor for name, tensor in json.loads(header).items() if name != "__metadata__"}
        return sorted((int(begin), int(end)) for begin, end in (t["data_offsets"] for t in tensors.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelUnavailable(f"{path}: not a readable safetensors file: {error!r}") from error
