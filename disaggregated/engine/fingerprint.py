"""Whether two servers may exchange KV: same weights, same numerics.

Weights are told apart by their files' sizes, headers and samples of their bytes, not by reading gigabytes at start.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import xxhash

SAMPLES_PER_FILE: Final = 64
SAMPLE_BYTES: Final = 4096
HEADER_BYTES_MAX: Final = 16 << 20


def weights_digest(paths: Sequence[Path]) -> str:
    """Of safetensors files: size, header (names, shapes, dtypes) and evenly spread samples of each, in name order."""
    digest = xxhash.xxh3_128()
    for path in sorted(paths, key=lambda path: path.name):
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            header_size = min(int.from_bytes(file.read(8), "little"), HEADER_BYTES_MAX)
            digest.update(file.read(header_size))
            for i in range(SAMPLES_PER_FILE):
                file.seek(header_size + 8 + (size - header_size - 8) * i // SAMPLES_PER_FILE)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def fingerprint(weights: str, *numerics: object) -> str:
    """`weights` is a digest or a name of the weights; `numerics` all else that a token's KV depends on."""
    digest = xxhash.xxh3_128(weights.encode())
    for item in numerics:
        digest.update(repr(item).encode() + b"\0")
    return digest.hexdigest()
