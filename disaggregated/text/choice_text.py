"""Token ids of one sequence, turned into the text that its reader may see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from disaggregated.text.stop_strings import StopStrings
from disaggregated.text.tokenizer import Tokenizer


class ChoiceText:
    """Detokenizes, drops the stopping token, and ends at the first stop string."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        stop: Sequence[str],
        *,
        shown: frozenset[int] = frozenset(),
        skip_special_tokens: bool = True,
        include_stop: bool = False,
    ) -> None:
        """`shown`: special tokens that are text all the same. `include_stop`: the text ends with what stopped it, if
        that is text."""
        self._detokenizer = tokenizer.detokenizer(prompt_ids, skip_special_tokens=skip_special_tokens, shown=shown)
        self._stops = StopStrings(stop, includes=include_stop) if stop else None
        self._include_stop = include_stop
        self.finish_reason = ""

    @property
    def may_stop(self) -> bool:
        """There are stop strings: text is held back while it could be the beginning of one."""
        return self._stops is not None

    def escaped(self, token_id: int) -> bytes | None:
        """As `push` of one token that is not the last, as JSON spells its text and without quotes; None: push it.

        Only where nothing `may_stop`: what may become a stop string has to be held back.
        """
        return self._detokenizer.escaped(token_id)

    def known(self) -> Mapping[int, bytes]:
        """What `escaped` says of some tokens, until the next `push`."""
        return self._detokenizer.known()

    @property
    def matched(self) -> str | None:
        """The stop string that ended it."""
        return None if self._stops is None else self._stops.matched

    def push(self, token_ids: Sequence[int], finish_reason: str) -> str:
        """The text that these ids complete. Afterwards `finish_reason` is set if it ends here, for whichever reason."""
        shown = token_ids[:-1] if finish_reason == "stop" and not self._include_stop else token_ids
        text = self._detokenizer.push(shown)
        if finish_reason:
            text += self._detokenizer.flush()
        self.finish_reason = finish_reason
        if self._stops is None:
            return text
        text, stopped = self._stops.push(text)
        if stopped:
            self.finish_reason = "stop"
        elif finish_reason:
            text += self._stops.flush()
        return text
