"""Compiles grammars on a thread of its own, so that neither the engine nor the event loop ever waits for one.

What was compiled is kept, by its text, until others need the room: a thousand requests with one schema compile it once,
also when they all come before it is done.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from disaggregated.engine.grammar.api import CompiledGrammar, Libraries
from disaggregated.engine.grammar.follower import GrammarFollower
from disaggregated.errors import QueueFull
from disaggregated.grammar import Grammar

NUM_WAITING_MAX: Final = 64
"""Different grammars that wait to be compiled; a request with another one is refused."""
CACHE_BYTES_MAX: Final = 256 << 20
CACHE_GRAMMARS_MAX: Final = 1024


class GrammarCompiler:
    """Implements `Grammars`. Any thread may call it.

    Invariant: `_compiled` has what is being compiled and what was, the least recently used first; what was is in
    `_sizes` too, and fits in `cache_bytes_max` and CACHE_GRAMMARS_MAX, the newest not counted.
    """

    def __init__(
        self,
        backends: Libraries,
        *,
        eos_token_ids: Collection[int],
        vocab_size: int,
        cache_bytes_max: int = CACHE_BYTES_MAX,
    ) -> None:
        self.eos_token_ids = frozenset(eos_token_ids)
        self._vocab_size = vocab_size
        self._backends = backends
        self._cache_bytes_max = cache_bytes_max
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
        self._lock = threading.Lock()
        self._compiled: OrderedDict[Grammar, Future[CompiledGrammar]] = OrderedDict()
        self._sizes: dict[Grammar, int] = {}
        """Bytes of those that are compiled."""
        self._num_bytes = 0

    def load(self) -> None:
        """Begin to load the libraries, beside whatever else is loaded. Whoever comes early waits for that."""
        self._thread.submit(self._backends.load)

    def begin(self, grammar: Grammar) -> Future[GrammarFollower]:
        """A follower at the beginning of the text, once the grammar is compiled; it fails with GrammarRefused.

        Raises:
            QueueFull: too many grammars wait already.
        """
        compiled = self._compile(dataclasses.replace(grammar, starts_after=()))
        beginning: Future[GrammarFollower] = Future()

        def begin(compiled: Future[CompiledGrammar]) -> None:
            if (error := compiled.exception()) is not None:
                beginning.set_exception(error)
            else:
                beginning.set_result(self._follower(compiled.result(), grammar))

        compiled.add_done_callback(begin)
        return beginning

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def check_integrity(self) -> None:
        with self._lock:
            assert self._sizes.keys() <= self._compiled.keys(), "something is forgotten and still counted"
            assert self._num_bytes == sum(self._sizes.values()), f"{self._num_bytes} bytes counted"

    def _follower(self, compiled: CompiledGrammar, grammar: Grammar) -> GrammarFollower:
        return GrammarFollower(
            compiled.matcher(),
            starts_after=grammar.starts_after,
            eos_token_ids=self.eos_token_ids,
            vocab_size=self._vocab_size,
        )

    def _compile(self, grammar: Grammar) -> Future[CompiledGrammar]:
        with self._lock:
            if (known := self._compiled.get(grammar)) is not None:
                self._compiled.move_to_end(grammar)
                return known
            num_waiting = len(self._compiled) - len(self._sizes)
            if num_waiting >= NUM_WAITING_MAX:
                raise QueueFull(f"{num_waiting} grammars wait to be compiled, the limit is {NUM_WAITING_MAX}")
            compiled: Future[CompiledGrammar] = Future()
            self._compiled[grammar] = compiled
        self._thread.submit(self._run, grammar, compiled)
        return compiled

    def _run(self, grammar: Grammar, compiled: Future[CompiledGrammar]) -> None:
        try:
            found = self._backends.compile(grammar)
        except BaseException as error:  # noqa: BLE001  # The thread's edge; whoever asked for it is told.
            with self._lock:
                del self._compiled[grammar]
            compiled.set_exception(error)
            return
        with self._lock:
            self._sizes[grammar] = found.num_bytes
            self._num_bytes += found.num_bytes
            self._make_room(besides=grammar)
        compiled.set_result(found)

    def _make_room(self, *, besides: Grammar) -> None:
        """Forget what was not used for the longest time; followers of it go on."""
        for grammar in [each for each in self._compiled if each in self._sizes and each != besides]:
            if self._num_bytes <= self._cache_bytes_max and len(self._sizes) <= CACHE_GRAMMARS_MAX:
                return
            del self._compiled[grammar]
            self._num_bytes -= self._sizes.pop(grammar)
