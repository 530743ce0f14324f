"""A pass in ranges of layers gives the bits of one call, and what is said to be written is, for every kind of model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from disaggregated.engine.layer_progress import LayerProgress, layer_ranges
from disaggregated.engine.ops import native
from disaggregated.engine.ops.api import Ops
from disaggregated.engine.ops.native_kv import takes_head_dim
from disaggregated.engine.ops.reference import ReferenceOps
from disaggregated.engine.ops.torch_attention import WithTorchAttention
from disaggregated.engine.runner import TorchModelRunner
from disaggregated.model_files import ModelConfig
from tests.unit.engine.runners import Driven, make_runner, random_blocks, random_prompt
from tests.unit.engine.test_transformers_models import runner_of
from tests.unit.engine.tiny_models import FAMILIES, OTHERS, VOCAB_SIZE, write_model

NUM_LAYERS = 3
LENGTHS = [70, 1, 33]
"""Of three prompts in one step; a second step continues the first of them."""


@dataclasses.dataclass(slots=True)
class Watched:
    """What was told during a pass, with a copy of the layers that were said to be written, as they were then."""

    runner: TorchModelRunner
    told: list[int] = dataclasses.field(default_factory=list)
    seen: list[list[torch.Tensor]] = dataclasses.field(default_factory=list)

    def written(self, num_layers: int) -> None:
        self.told.append(num_layers)
        self.seen.append([layer.clone() for layer in stored(self.runner)[:num_layers]])


def stored(runner: TorchModelRunner) -> list[torch.Tensor]:
    return list(runner._kv_cache.blocks_LBX.unbind(0))


def prompts() -> list[Driven]:
    blocks = random_blocks(24, 1)
    return [Driven(random_prompt(n, n, VOCAB_SIZE), [blocks.pop() for _ in range(8)]) for n in LENGTHS]


def check_same(one_call: TorchModelRunner, layered: TorchModelRunner, every: int) -> None:
    """Two steps of both: chunks of prompts, one of them to its end, beside a single token."""
    ones, others = prompts(), prompts()
    for sizes in ((40, 1, 33), (30,)):
        expected = one_call.execute([one.take(size) for one, size in zip(ones, sizes, strict=False)])
        watched = Watched(layered)
        batch = [other.take(size) for other, size in zip(others, sizes, strict=False)]
        assert layered.execute_layered(batch, LayerProgress(every, watched.written)) == expected
        assert watched.told == [end for _, end in layer_ranges(NUM_LAYERS, LayerProgress(every, print))]
        for num_layers, seen in zip(watched.told, watched.seen, strict=True):
            final = stored(one_call)[:num_layers]
            assert all(torch.equal(a, b) for a, b in zip(seen, final, strict=True)), f"{num_layers} layers"
    assert all(torch.equal(a, b) for a, b in zip(stored(one_call), stored(layered), strict=True))


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(request.param, tmp_path_factory.mktemp(request.param)).path


def test_op_by_op_every_family_gives_the_same_bits_in_ranges_of_layers(family: Path) -> None:
    check_same(make_runner(family), make_runner(family), every=1)


def native_ops(family: Path, num_threads: int) -> Ops:
    """With torch's attention where the kernels have none, as a server does it."""
    ops = native.load(num_threads)
    assert ops is not None
    config = ModelConfig.load(family)
    return ops if takes_head_dim(config.head_dim) and config.latent is None else WithTorchAttention(ops)


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.skipif(native.load(1) is None, reason="no native kernels here: no C compiler")
def test_native_kernels_give_the_same_bits_in_ranges_of_layers(family: Path, every: int) -> None:
    one_call, layered = (make_runner(family, ops=native_ops(family, threads)) for threads in (1, 2))
    check_same(one_call, layered, every)


@pytest.mark.parametrize("name", [*list(OTHERS)[:2], "llama"])
def test_the_librarys_models_tell_their_layers_too(name: str, tmp_path: Path) -> None:
    path = write_model(name, tmp_path).path
    check_same(runner_of(path, ReferenceOps()), runner_of(path, ReferenceOps()), every=2)


@pytest.mark.parametrize(
    ("num_layers", "every", "ranges"),
    [
        (3, None, [(0, 3)]),
        (3, 1, [(0, 1), (1, 2), (2, 3)]),
        (5, 2, [(0, 2), (2, 4), (4, 5)]),
        (5, 5, [(0, 5)]),
        (5, 9, [(0, 5)]),
    ],
)
def test_ranges_of_layers_cover_all_of_them(num_layers: int, every: int | None, ranges: list[tuple[int, int]]) -> None:
    progress = None if every is None else LayerProgress(every, lambda _: None)
    assert layer_ranges(num_layers, progress) == ranges


def test_layers_that_come_in_another_order_are_not_told() -> None:
    from disaggregated.engine.models.transformers_attention import RunningStep

    told: list[int] = []
    for order in ([1, 0, 2], [2, 1, 0], [0, 2, 1]):
        step = RunningStep(
            batch=None,  # type: ignore[arg-type]  # Not looked at.
            pools=[None] * 3,  # type: ignore[list-item]
            ops=ReferenceOps(),
            progress=LayerProgress(1, told.append),
        )
        for layer in order:
            step.layer_is_written(layer)
    assert told == [1]  # Of the last order, before it went wrong.
