"""The safetensors format: checking a file without reading its tensors, and writing one tensor at a time.

A file is an eight-byte length, a JSON header with each tensor's dtype, shape and place, and the tensors' bytes. The
package `safetensors` writes only what is in memory all at once, and its numpy side knows no bfloat16.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from disaggregated.errors import ModelUnavailable

ITEM_BYTES: Final = {"F32": 4, "F16": 2, "BF16": 2}
_HEADER_BYTES_MAX: Final = 100_000_000


class TensorPlan(NamedTuple):
    name: str
    dtype: str
    """One of ITEM_BYTES."""
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def write(path: Path, plans: Sequence[TensorPlan], tensors: Iterable[bytes | memoryview]) -> None:
    """Write `tensors`, which come in the order of `plans`, each of exactly the planned size."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for plan in plans:
        header[plan.name] = {
            "dtype": plan.dtype,
            "shape": list(plan.shape),
            "data_offsets": [end, end + plan.num_bytes],
        }
        end += plan.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for plan, tensor in zip(plans, tensors, strict=True):
            num_bytes = memoryview(tensor).nbytes
            assert num_bytes == plan.num_bytes, f"{plan.name}: planned {plan.num_bytes} bytes, got {num_bytes}"
            file.write(tensor)


def check(path: Path) -> None:
    """Raises ModelUnavailable unless `path` is a safetensors file of the length that its header promises."""
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if header_bytes > _HEADER_BYTES_MAX:
                raise ModelUnavailable(f"{path} is not a safetensors file")
            header = json.loads(file.read(header_bytes))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        expected, found = 8 + header_bytes + max(ends, default=0), path.stat().st_size
    except OSError as error:
        raise ModelUnavailable(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ModelUnavailable(f"{path} is damaged (its header is unreadable): fetch it again") from error
    if found != expected:
        raise ModelUnavailable(f"{path} is damaged ({found} bytes instead of {expected}): fetch it again")
