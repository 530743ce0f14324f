"""What a reply must match, in all the ways that clients have to say it: OpenAI's, vLLM's and TensorRT-LLM's.

Only what is cheap is checked here; whether a grammar can be compiled is found out beside the event loop, by
`grammar_check.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from disaggregated.errors import InvalidRequest
from disaggregated.grammar import Grammar, GrammarKind
from disaggregated.structured.json_schema import schema_text
from disaggregated.structured.readers import read_choice, read_grammar, read_json_object, read_json_schema, read_regex
from disaggregated.structured.structural_tag import read_structural_tag
from orchestrator.api.fields import Fields, json_type, wrong_type

Reader = Callable[[Any, str], Grammar | None]
"""(value, its name) to what it asks for."""


def _response_format(value: Any, name: str) -> Grammar | None:
    """OpenAI's; the types regex, ebnf and json are TensorRT-LLM's."""
    if not isinstance(value, dict):
        raise wrong_type(name, "an object", value)
    kind = value.get("type")
    match kind:
        case "text":
            return None
        case "json_object" if value.get("schema") is None:
            return Grammar(GrammarKind.JSON_OBJECT)
        case "json_object" | "json":
            return read_json_schema(_member(value, "schema", name), f"{name}.schema")
        case "json_schema":
            return _named_schema(_member(value, "json_schema", name), f"{name}.json_schema")
        case "regex" | "ebnf" | "grammar":
            read = read_regex if kind == "regex" else read_grammar
            return read(_member(value, kind, name), f"{name}.{kind}")
        case "structural_tag":
            return read_structural_tag(value, name)
    known = "text, json_object, json_schema, structural_tag, regex or ebnf"
    raise InvalidRequest(f"{name}.type must be {known}, is {_shown(kind)}", param=name)


def _named_schema(value: Any, name: str) -> Grammar:
    """Keywords that cannot be enforced are refused where `strict` is true, and are wishes elsewhere."""
    if not isinstance(value, dict):
        raise wrong_type(name, "an object", value)
    strict = value.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise wrong_type(f"{name}.strict", "true or false", strict)
    schema = _member(value, "schema", name)
    return Grammar(GrammarKind.JSON_SCHEMA, schema_text(schema, f"{name}.schema", is_lenient=not strict))


def _one_of(value: Any, name: str) -> Grammar | None:
    """vLLM's `structured_outputs` and TensorRT-LLM's `guided_decoding`: an object of which one member counts."""
    if not isinstance(value, dict):
        raise wrong_type(name, "an object", value)
    for key, member in value.items():
        if key not in _MEMBERS and key not in _WITHOUT_EFFECT and member is not None:
            raise InvalidRequest(f"{name}.{key[:80]} is not supported", param=name)
    return _only({f"{name}.{key}": (value.get(key), read) for key, read in _MEMBERS.items()})


_MEMBERS: Final[Mapping[str, Reader]] = {
    "json": read_json_schema,
    "json_object": read_json_object,
    "regex": read_regex,
    "choice": read_choice,
    "grammar": read_grammar,
    "structural_tag": read_structural_tag,
}
_WITHOUT_EFFECT: Final = frozenset(
    {"disable_any_whitespace", "disable_additional_properties", "disable_fallback", "_backend", "backend"}
)
"""Here blanks and further properties are always as these ask for, and servers choose the library."""

STRUCTURED: Final[Mapping[str, Reader]] = {
    "response_format": _response_format,
    "guided_json": read_json_schema,
    "guided_json_object": read_json_object,
    "guided_regex": read_regex,
    "guided_choice": read_choice,
    "guided_grammar": read_grammar,
    "structured_outputs": _one_of,
    "guided_decoding": _one_of,
}
"""Every field that asks for a grammar."""


def grammar_of(fields: Fields) -> Grammar | None:
    """
    Raises:
        InvalidRequest: names the field that is wrong, or two that ask for different things.
    """
    return _only({name: (fields.get(name), read) for name, read in STRUCTURED.items()})


def grammar_field(fields: Fields) -> str:
    """Which field `grammar_of` has read it from; "" where there is none."""
    asking = (name for name in STRUCTURED if fields.get(name) not in (None, False, {"type": "text"}))
    return next(asking, "")


def _only(named: Mapping[str, tuple[Any, Reader]]) -> Grammar | None:
    found: dict[str, Grammar] = {}
    for name, (value, read) in named.items():
        if value is not None and (grammar := read(value, name)) is not None:
            found[name] = grammar
    if len(found) > 1:
        first, second, *_rest = found
        raise InvalidRequest(f"{first} and {second} both say what the reply must match", param=second)
    return next(iter(found.values()), None)


def _member(value: Mapping[str, Any], key: str, name: str) -> Any:
    if value.get(key) is None:
        raise InvalidRequest(f"{name}.{key} is missing", param=name)
    return value[key]


def _shown(value: Any) -> str:
    return repr(value)[:80] if isinstance(value, str) else json_type(value)
