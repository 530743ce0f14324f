"""Who is told what while a chunk is computed, by an engine over a runner without a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from disaggregated.engine.api import RequestKind, ScheduledSequence
from disaggregated.engine.layer_progress import LayerProgress, layer_ranges
from disaggregated.engine.layer_watch import ChunkUnderWay
from tests.support.fake_device import FakeDevice
from tests.support.fake_runner import FakeModelRunner
from tests.unit.engine.engine_driver import EngineDriver

NUM_LAYERS = 4


class LayeredFake(FakeModelRunner):
    """Implements `LayeredRunner`."""

    def __init__(self, like: FakeModelRunner) -> None:
        super().__init__(num_blocks=len(like.slots) // like.block_size, block_size=like.block_size)
        self.num_layered = 0

    def execute_layered(self, batch: Sequence[ScheduledSequence], progress: LayerProgress) -> Sequence[Sequence[int]]:
        self.num_layered += 1
        for _, end in layer_ranges(NUM_LAYERS, progress):
            progress.written(end)
        return self.execute(batch)


@dataclasses.dataclass
class Watcher:
    wanted: set[str]
    every: int = 2
    began: list[list[ChunkUnderWay]] = dataclasses.field(default_factory=list)
    told: list[tuple[str, int, int, int]] = dataclasses.field(default_factory=list)
    """Request, tokens before the chunk, tokens with it, layers."""

    def chunks_begin(self, chunks: Sequence[ChunkUnderWay]) -> int | None:
        self.began.append(list(chunks))
        return self.every if any(chunk.request_id in self.wanted for chunk in chunks) else None

    def layers_written(self, chunks: Sequence[ChunkUnderWay], num_layers: int) -> None:
        for chunk in chunks:
            self.told.append((chunk.request_id, chunk.first_position, chunk.num_computed_tokens, num_layers))


def watched(*wanted: str, overlap: bool = False) -> tuple[EngineDriver, Watcher, LayeredFake]:
    driver, watcher = EngineDriver(overlap=overlap), Watcher(set(wanted))
    runner = LayeredFake(driver.runner)
    driver.engine._steps._runner = runner
    assert driver.engine.watch_layers(watcher) is not overlap
    return driver, watcher, runner


def test_a_wanted_prompt_is_told_of_chunk_by_chunk_and_layer_by_layer() -> None:
    driver, watcher, runner = watched("one")
    driver.submit("one", range(1, 12), kind=RequestKind.PREFILL_ONLY)
    driver.step()
    assert watcher.told == [("one", 0, 8, 2), ("one", 0, 8, 4)]
    (chunk,) = watcher.began[0]
    (computed,) = driver.chunks["one"]
    assert chunk.block_ids == computed.block_ids
    driver.step()
    assert watcher.told[2:] == [("one", 8, 11, 2), ("one", 8, 11, 4)]
    assert watcher.began[1][0].block_ids == driver.chunks["one"][1].block_ids
    assert runner.num_layered == 2


def test_tokens_of_the_prefix_cache_are_before_the_first_chunk() -> None:
    driver, watcher, _ = watched("again")
    for name in ("one", "again"):
        driver.submit(name, range(1, 12), kind=RequestKind.PREFILL_ONLY)
        driver.run()
        driver.engine.release(name)
    assert watcher.told == [("again", 8, 11, 2), ("again", 8, 11, 4)]


def test_a_step_without_a_wanted_prompt_is_one_call() -> None:
    driver, watcher, runner = watched("one")
    driver.submit("unwanted", range(1, 6), kind=RequestKind.PREFILL_ONLY)
    driver.submit("whole", range(1, 6), kind=RequestKind.FULL)
    driver.engine.step()
    driver.engine.cancel("whole")
    driver.run()
    assert runner.num_layered == 0
    assert not watcher.told
    assert {chunk.request_id for began in watcher.began for chunk in began} == {"unwanted"}


def test_an_unwanted_prompt_beside_a_wanted_one_is_in_the_same_pass_and_the_tokens_are_the_oracles() -> None:
    driver, watcher, runner = watched("one")
    driver.submit("one", range(1, 5), kind=RequestKind.PREFILL_ONLY)
    driver.submit("whole", range(5, 9), max_tokens=3)
    driver.run()
    assert runner.num_layered == 1
    assert {name for name, *_ in watcher.told} == {"one"}
    assert driver.tokens["whole"] == driver.alone("whole")
    assert driver.tokens["one"] == driver.alone("one")[:1]


def test_an_engine_whose_steps_overlap_or_whose_runner_knows_no_layers_says_so() -> None:
    watched("one", overlap=True)
    plain = EngineDriver()
    assert isinstance(plain.runner, FakeDevice)
    assert not plain.engine.watch_layers(Watcher(set()))
