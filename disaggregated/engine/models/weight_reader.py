"""How the parts of a model get their weights: by name and shape, one description for three uses.

A part says once which tensors it is made of (`GatedMlp.read` and its neighbours). Read through a `LoadingReader` that
gives the weights, laid out for the op table; read through a `ShapeRecorder` it gives the list of names and shapes that
a checkpoint must have, which dummy weights are made of too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from disaggregated.engine.ops.api import Ops

Shape = tuple[int, ...]
MakeLinear = Callable[[], tuple[torch.Tensor, torch.Tensor | None]]
"""Gives a weight, (outputs, inputs), and a bias."""


class TensorSource(Protocol):
    def shapes(self) -> Mapping[str, Shape]: ...

    def read(self, name: str) -> torch.Tensor: ...


class WeightReader(Protocol):
    def tensor(self, name: str, shape: Shape, dtype: torch.dtype | None) -> torch.Tensor:
        """Of `dtype`, or else the model's, on the model's device."""

    def prepare(self, make: MakeLinear, *, exact: bool) -> Any:
        """As `Ops.prepare_linear`, with what `make` makes of tensors that were read before."""

    def to_device(self, table: torch.Tensor) -> torch.Tensor:
        """Of what is computed, not read."""


class LoadingReader:
    """Implements `WeightReader`; the shapes of `source` are checked before."""

    def __init__(self, source: TensorSource, ops: Ops, *, device: torch.device, dtype: torch.dtype) -> None:
        self._source, self._ops = source, ops
        self._device, self._dtype = device, dtype

    def tensor(self, name: str, shape: Shape, dtype: torch.dtype | None) -> torch.Tensor:
        tensor = self._source.read(name).to(device=self._device, dtype=dtype or self._dtype)
        assert tensor.shape == shape, f"{name} is {tuple(tensor.shape)}, was checked to be {shape}"
        return tensor

    def prepare(self, make: MakeLinear, *, exact: bool) -> Any:
        return self._ops.prepare_linear(*make(), exact=exact)

    def to_device(self, table: torch.Tensor) -> torch.Tensor:
        return table.to(self._device)


class ShapeRecorder:
    """Implements `WeightReader` without weights: tensors are empty, and nothing is made of them."""

    def __init__(self) -> None:
        self.shapes: dict[str, Shape] = {}

    def tensor(self, name: str, shape: Shape, dtype: torch.dtype | None) -> torch.Tensor:
        self.shapes[name] = shape
        return torch.empty(0)

    def prepare(self, make: MakeLinear, *, exact: bool) -> None:
        pass

    def to_device(self, table: torch.Tensor) -> torch.Tensor:
        return table


class NamedWeights:
    """The weights of one module: names are relative to its own."""

    def __init__(self, reader: WeightReader, prefix: str = "") -> None:
        self._reader, self._prefix = reader, prefix

    def within(self, module: str) -> NamedWeights:
        return NamedWeights(self._reader, f"{self._prefix}{module}.")

    def tensor(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self._reader.tensor(self._prefix + name, shape, dtype)

    def norm(self, name: str, width: int) -> torch.Tensor:
        return self.tensor(name + ".weight", width)

    def linear(self, outputs: Mapping[str, int], num_inputs: int, *, biased: Sequence[str] = ()) -> Any:
        """One linear whose outputs are those of the named modules, in order; those in `biased` have a bias."""
        rows = [self.tensor(f"{name}.weight", width, num_inputs) for name, width in outputs.items()]
        biases = [
            self.tensor(f"{name}.bias", width) if name in biased else rows[0].new_zeros(width)
            for name, width in outputs.items()
        ]
        return self.prepare(lambda: (joined(rows), joined(biases) if biased else None))

    def prepare(self, make: MakeLinear, *, exact: bool = False) -> Any:
        """`make` gives a weight, (outputs, inputs), and a bias; it is called only where there are weights."""
        return self._reader.prepare(make, exact=exact)

    def to_device(self, table: torch.Tensor) -> torch.Tensor:
        return self._reader.to_device(table)


def num_numbers(shapes: Mapping[str, Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]
