"""What generated text must match, as data: it travels with a request, and every server that continues it reads it."""

from __future__ import annotations

import dataclasses
import enum
from typing import Final

from disaggregated.errors import InvalidRequest
from disaggregated.v1 import control_pb2

TEXT_BYTES_MAX: Final = 256 << 10
STARTS_AFTER_MAX: Final = 64


class GrammarKind(enum.StrEnum):
    JSON_OBJECT = "json_object"
    """Any JSON object; no text."""
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    """Of the whole text, as if between ^ and $."""
    CHOICE = "choice"
    """One of a JSON array of strings."""
    EBNF = "ebnf"
    """GBNF, whose start symbol is `root`."""
    LARK = "lark"
    """llguidance's dialect, whose start symbol is `start`; it can have JSON schemas within it: `%json {…}`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Grammar:
    """Hashable: the same text is compiled once."""

    kind: GrammarKind
    text: str = ""
    starts_after: tuple[int, ...] = ()
    """The text is free up to and including this run of token ids, such as a model's `</think>`; empty: the grammar
    holds from the first generated token on."""

    def to_proto(self) -> control_pb2.Grammar:
        return control_pb2.Grammar(kind=self.kind, text=self.text, starts_after=self.starts_after)

    @classmethod
    def from_proto(cls, message: control_pb2.Grammar) -> Grammar:
        """Raises InvalidRequest for what no orchestrator of ours sends."""
        if message.kind not in [*GrammarKind]:
            raise InvalidRequest(f"grammar: kind {message.kind[:40]!r} is none of {[*GrammarKind]}", param="grammar")
        if (num_bytes := len(message.text.encode())) > TEXT_BYTES_MAX:
            raise InvalidRequest(f"grammar: {num_bytes} bytes, the limit is {TEXT_BYTES_MAX}", param="grammar")
        if len(message.starts_after) > STARTS_AFTER_MAX:
            raise InvalidRequest(
                f"grammar: starts after {len(message.starts_after)} tokens, the limit is {STARTS_AFTER_MAX}",
                param="grammar",
            )
        return cls(GrammarKind(message.kind), message.text, tuple(message.starts_after))
