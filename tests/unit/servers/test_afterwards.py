"""What a server does beside its first requests: pages, then the library of grammars; nobody waits for either."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

from disaggregated.engine.serving import afterwards
from disaggregated.errors import NotEnoughMemory

WAIT_S = 10.0


class Memory:
    """Implements `PoolMemory`; populated when the test says so."""

    def __init__(self, done: list[str], error: NotEnoughMemory | None = None) -> None:
        self.buffer = memoryview(b"")
        self.may_end = threading.Event()
        self._done, self._error = done, error

    def populate(self) -> None:
        assert self.may_end.wait(WAIT_S)
        if self._error is not None:
            raise self._error
        self._done.append("pages")

    def close(self) -> None:
        pass


def loaded(done: list[str]) -> Any:
    return SimpleNamespace(grammars=SimpleNamespace(load=lambda: done.append("grammars")))


def never(error: BaseException) -> None:
    raise AssertionError(error)


def test_nobody_waits_and_the_pages_come_first() -> None:
    done: list[str] = []
    memory = Memory(done)
    thread = afterwards.begin(memory, loaded(done), never)
    assert done == []
    memory.may_end.set()
    thread.join(WAIT_S)
    assert done == ["pages", "grammars"]


def test_a_model_without_grammars_has_no_library_to_load() -> None:
    done: list[str] = []
    memory = Memory(done)
    memory.may_end.set()
    no_grammars: Any = SimpleNamespace(grammars=None)
    afterwards.begin(memory, no_grammars, never).join(WAIT_S)
    assert done == ["pages"]


def test_pages_that_are_not_there_end_the_process() -> None:
    done: list[str] = []
    crashes: list[BaseException] = []
    memory = Memory(done, NotEnoughMemory("no 5 bytes for the KV pool"))
    memory.may_end.set()
    afterwards.begin(memory, loaded(done), crashes.append).join(WAIT_S)
    assert [str(error) for error in crashes] == ["no 5 bytes for the KV pool"]
    assert done == []
