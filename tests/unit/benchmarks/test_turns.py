"""Contenders of a benchmark take turns, and what warms them up is not counted."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

from benchmarks.wire import shapes
from benchmarks.wire.contender import take_turns
from disaggregated.kv_layout import KVLayout


@dataclasses.dataclass
class Counted:
    name: str
    story: list[str]
    seconds: float

    def pids(self) -> Sequence[int]:
        return [os.getpid()]

    async def prepare(self) -> None:
        self.story.append(f"prepare {self.name}")

    async def transfer(self) -> float:
        self.story.append(self.name)
        return self.seconds


async def test_each_round_goes_the_other_way_and_the_first_is_not_counted() -> None:
    story: list[str] = []
    found = await take_turns([Counted("a", story, 2.0), Counted("b", story, 4.0)], num_rounds=2)
    assert [each for each in story if len(each) == 1] == ["b", "a", "a", "b", "b", "a"]
    assert all(f"prepare {name}" == before for before, name in zip(story[::2], story[1::2], strict=True))
    assert (found["a"].seconds, found["b"].seconds) == ([2.0, 2.0], [4.0, 4.0])
    assert found["a"].gigabytes_per_s(4_000_000_000) == 2.0
    assert len(found["a"].cpu_s) == 2


def test_the_pieces_of_a_shape_are_every_block_of_every_layer_once() -> None:
    layout = KVLayout(num_layers=3, num_kv_heads=1, head_dim=8, block_size=4, dtype="float32", num_blocks=5)
    found = list(shapes.pieces(layout, shapes.scattered(layout, 1)))
    assert sorted(begin for begin, _ in found) == [at * layout.block_bytes for at in range(15)]
    assert {size for _, size in found} == {layout.block_bytes}
