"""Sequences whose grammar is still compiled: nobody else waits for it, and their own prompts are computed meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from disaggregated.engine.grammar import attach as grammars
from disaggregated.engine.grammar.api import Grammars
from disaggregated.engine.grammar.follower import GrammarFollower
from disaggregated.engine.roster import Roster
from disaggregated.engine.sequence import Sequence

RunSoon = Callable[[Callable[[], None]], None]


class GrammarWait:
    """Part of an engine, and owned by its thread."""

    def __init__(self, source: Grammars | None, roster: Roster, note_work: Callable[[], None]) -> None:
        """note_work: called before a sequence whose grammar has come may be computed again."""
        self._source = source
        self._roster = roster
        self._note_work = note_work
        self.run_soon: RunSoon | None = None
        """Lets the thread that owns the engine call something; of any thread. None: whoever submits waits for
        grammars."""

    def begin(self, sequence: Sequence) -> Future[GrammarFollower] | None:
        """As of `grammar.attach.begin`; what it gives is for join(), once the engine has taken the sequence."""
        return grammars.begin(self._source, sequence)

    def join(self, sequence: Sequence, beginning: Future[GrammarFollower] | None) -> None:
        """The sequence is known; it samples once its grammar is there."""
        if beginning is None:
            return
        if beginning.done() or self.run_soon is None:
            self._attach(sequence, beginning)
            return
        run_soon = self.run_soon
        beginning.add_done_callback(lambda done: run_soon(lambda: self._attach(sequence, done)))

    def _attach(self, sequence: Sequence, beginning: Future[GrammarFollower]) -> None:
        if sequence.phase in grammars.MAY_SAMPLE:
            self._note_work()
            if (error := grammars.attach(sequence, beginning)) is not None:
                self._roster.fail(sequence, error)
