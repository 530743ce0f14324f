"""Grammars are compiled once, beside whoever asks, kept while there is room, and refused in words."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from disaggregated.engine.grammar import compiler as compiler_module
from disaggregated.engine.grammar.api import Mask
from disaggregated.engine.grammar.compiler import GrammarCompiler
from disaggregated.errors import GrammarRefused, QueueFull
from disaggregated.grammar import Grammar, GrammarKind

PATIENCE_S = 10.0


class FakeMatcher:
    def fill(self, mask: Mask) -> None:
        mask[:] = 0

    def accept(self, token_id: int) -> bool:
        return True

    def rollback(self, num_tokens: int) -> None:
        pass


class FakeCompiled:
    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes

    def matcher(self) -> FakeMatcher:
        return FakeMatcher()


class FakeBackends:
    """Compiles when it is let; the size of a grammar is its text. "bad" is refused, "broken" raises something else."""

    def __init__(self) -> None:
        self.may_compile = threading.Event()
        self.may_compile.set()
        self.compiled: list[str] = []

    def load(self) -> None:
        self.compiled.append("loaded")

    def compile(self, grammar: Grammar) -> FakeCompiled:
        assert self.may_compile.wait(PATIENCE_S)
        self.compiled.append(grammar.text)
        if grammar.text == "bad":
            raise GrammarRefused("grammar: bad", param="grammar")
        if grammar.text == "broken":
            raise ZeroDivisionError
        return FakeCompiled(int(grammar.text))


@contextmanager
def compiling(cache_bytes_max: int = 100) -> Iterator[tuple[GrammarCompiler, FakeBackends]]:
    backends = FakeBackends()
    compiler = GrammarCompiler(backends, eos_token_ids=[0], vocab_size=32, cache_bytes_max=cache_bytes_max)
    try:
        yield compiler, backends
        compiler.check_integrity()
    finally:
        backends.may_compile.set()
        compiler.close()


def regex(text: str, starts_after: tuple[int, ...] = ()) -> Grammar:
    return Grammar(GrammarKind.REGEX, text, starts_after)


def test_one_grammar_is_compiled_once_for_all_who_come_before_it_is_done() -> None:
    with compiling() as (compiler, backends):
        backends.may_compile.clear()
        beginnings = [compiler.begin(regex("10", (index,))) for index in range(5)]
        assert not any(beginning.done() for beginning in beginnings)
        backends.may_compile.set()
        followers = [beginning.result(PATIENCE_S) for beginning in beginnings]
        assert len({id(follower) for follower in followers}) == 5
        assert compiler.begin(regex("10")).result(PATIENCE_S).num_followed == 0
        assert backends.compiled == ["10"]


def test_what_was_not_used_for_the_longest_time_makes_room() -> None:
    with compiling(cache_bytes_max=100) as (compiler, backends):
        for text in ("40", "50", "40", "60", "40", "50"):
            compiler.begin(regex(text)).result(PATIENCE_S)
            compiler.check_integrity()
        assert backends.compiled == ["40", "50", "60", "50"]


def test_a_grammar_larger_than_the_cache_is_kept_until_the_next_one() -> None:
    with compiling(cache_bytes_max=100) as (compiler, backends):
        for text in ("300", "300", "20", "300"):
            compiler.begin(regex(text)).result(PATIENCE_S)
        assert backends.compiled == ["300", "20", "300"]


@pytest.mark.parametrize(("text", "kind"), [("bad", GrammarRefused), ("broken", ZeroDivisionError)])
def test_a_refusal_is_told_to_everyone_and_not_kept(text: str, kind: type[Exception]) -> None:
    with compiling() as (compiler, backends):
        backends.may_compile.clear()
        beginnings = [compiler.begin(regex(text)) for _ in range(2)]
        backends.may_compile.set()
        for beginning in beginnings:
            with pytest.raises(kind):
                beginning.result(PATIENCE_S)
        with pytest.raises(kind):
            compiler.begin(regex(text)).result(PATIENCE_S)
        assert backends.compiled == [text, text]


def test_so_many_grammars_wait_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler_module, "NUM_WAITING_MAX", 2)
    with compiling() as (compiler, backends):
        backends.may_compile.clear()
        beginnings = [compiler.begin(regex(text)) for text in ("1", "2", "1")]
        with pytest.raises(QueueFull, match="2 grammars wait to be compiled, the limit is 2"):
            compiler.begin(regex("3"))
        backends.may_compile.set()
        for beginning in beginnings:
            beginning.result(PATIENCE_S)
        compiler.begin(regex("3")).result(PATIENCE_S)


def test_a_library_can_be_loaded_before_anybody_asks() -> None:
    with compiling() as (compiler, backends):
        compiler.load()
        compiler.begin(regex("1")).result(PATIENCE_S)
        assert backends.compiled == ["loaded", "1"]
