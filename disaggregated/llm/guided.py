"""What a caller may ask of a text's form; the names are TensorRT-LLM's, and `choice` is vLLM's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from disaggregated.errors import InvalidRequest
from disaggregated.grammar import Grammar
from disaggregated.structured.readers import read_choice, read_grammar, read_json_object, read_json_schema, read_regex


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GuidedDecodingParams:
    """The text matches one of these.

    Raises:
        InvalidRequest: a ValueError that names the field.
    """

    json: str | Mapping[str, Any] | type | None = None
    """A JSON schema, its text, or a pydantic model."""
    json_object: bool = False
    """Any JSON object."""
    regex: str | None = None
    choice: Sequence[str] | None = None
    """One of these."""
    grammar: str | None = None
    """GBNF, or llguidance's dialect of Lark."""

    def __post_init__(self) -> None:
        self.as_grammar()

    def as_grammar(self) -> Grammar:
        found = [
            read(value, name)
            for name, value, read in (
                ("json", _schema_of(self.json), read_json_schema),
                ("json_object", self.json_object or None, read_json_object),
                ("regex", self.regex, read_regex),
                ("choice", None if self.choice is None else list(self.choice), read_choice),
                ("grammar", self.grammar, read_grammar),
            )
            if value is not None
        ]
        if len(found) != 1 or found[0] is None:
            raise InvalidRequest(f"guided_decoding names {len(found)} forms, it must name one", param="guided_decoding")
        return found[0]


def _schema_of(value: object) -> object:
    if isinstance(value, type):
        schema = getattr(value, "model_json_schema", None)
        return schema() if callable(schema) else value
    return dict(value) if isinstance(value, Mapping) else value
