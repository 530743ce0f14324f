"""Reading a GGUF file: its keys, and where its tensors lie.

The `gguf` package has a reader too; it makes a numpy view of each of a vocabulary's hundred thousand strings, which
takes three seconds for a small model. This one takes a tenth of one and needs nothing but the standard library, so the
orchestrator can take a tokenizer out of a GGUF without numpy. Layout: magic, version, counts, keys, tensor table,
padding, tensors. All numbers are little-endian; big-endian files are refused.
"""

from __future__ import annotations

import dataclasses
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from disaggregated.errors import ModelUnavailable

_MAGIC: Final = b"GGUF"
_SCALARS: Final[Mapping[int, struct.Struct]] = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_STRING: Final = 8
_ARRAY: Final = 9
_U32: Final = _SCALARS[4]
_U64: Final = _SCALARS[10]


@dataclasses.dataclass(frozen=True, slots=True)
class GgufTensor:
    name: str
    shape: tuple[int, ...]
    """Rows first, as numpy and torch count; GGUF itself counts the other way round."""
    ggml_type: int
    offset: int
    """In bytes from the beginning of the file."""


class GgufFile:
    """An open GGUF file. `keys` and `tensors` are read at once; a tensor's bytes stay on disk until asked for.

    A context manager, because it holds a memory map. Raises ModelUnavailable if the file is not a readable GGUF.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ModelUnavailable(f"cannot read {path}: {error}") from error
        self._at = 0
        try:
            self._read_header()
        except (struct.error, IndexError, UnicodeDecodeError, OverflowError) as error:
            self._map.close()
            raise ModelUnavailable(f"{path} is damaged or cut short: {error}; fetch it again") from error
        except ModelUnavailable:
            self._map.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._map.close()

    @property
    def architecture(self) -> str:
        return str(self.require("general.architecture"))

    def require(self, key: str) -> Any:
        """The value of `key`. Raises ModelUnavailable naming file and key if it is not there."""
        try:
            return self.keys[key]
        except KeyError:
            raise ModelUnavailable(f"{self.path} has no key {key}; it cannot be served") from None

    def read(self, tensor: GgufTensor, num_bytes: int) -> bytes:
        """The `num_bytes` of a tensor, as they are on disk (a copy: nobody holds the map open by accident)."""
        piece = self._map[tensor.offset : tensor.offset + num_bytes]
        if len(piece) != num_bytes:
            raise ModelUnavailable(f"{self.path} is cut short in tensor {tensor.name}; fetch it again")
        return piece

    def _read_header(self) -> None:
        if self._map[:4] != _MAGIC:
            raise ModelUnavailable(f"{self.path} is not a GGUF file")
        self._at = 4
        version = self._scalar(_U32)
        if version not in (2, 3):
            raise ModelUnavailable(
                f"{self.path} is GGUF version {version}; versions 2 and 3 (little-endian) can be read"
            )
        num_tensors, num_keys = self._scalar(_U64), self._scalar(_U64)
        self.keys: dict[str, Any] = {}
        for _ in range(num_keys):
            name = self._string()
            self.keys[name] = self._value(self._scalar(_U32))
        entries = [self._tensor_entry() for _ in range(num_tensors)]
        alignment = int(self.keys.get("general.alignment", 32))
        start = -(-self._at // alignment) * alignment
        self.tensors = {name: GgufTensor(name, shape, kind, start + offset) for name, shape, kind, offset in entries}

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        extents = [self._scalar(_U64) for _ in range(self._scalar(_U32))]
        kind = self._scalar(_U32)
        return name, tuple(reversed(extents)), kind, self._scalar(_U64)

    def _scalar(self, layout: struct.Struct) -> Any:
        (value,) = layout.unpack_from(self._map, self._at)
        self._at += layout.size
        return value

    def _string(self) -> str:
        length = self._scalar(_U64)
        end = self._at + length
        if end > len(self._map):
            raise IndexError(f"a string of {length} bytes at {self._at}")
        text = self._map[self._at : end].decode()
        self._at = end
        return text

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(self._layout(kind))
        item, count = self._scalar(_U32), self._scalar(_U64)
        if item == _STRING:
            return [self._string() for _ in range(count)]
        if item == _ARRAY:
            return [self._value(_ARRAY) for _ in range(count)]
        return self._numbers(self._layout(item), count)

    def _numbers(self, layout: struct.Struct, count: int) -> list[Any]:
        end = self._at + layout.size * count
        if end > len(self._map):
            raise IndexError(f"an array of {count} numbers at {self._at}")
        numbers = [value for (value,) in layout.iter_unpack(self._map[self._at : end])]
        self._at = end
        return numbers

    def _layout(self, kind: int) -> struct.Struct:
        try:
            return _SCALARS[kind]
        except KeyError:
            raise IndexError(f"a value of the unknown type {kind} at {self._at}") from None
