"""Values that a JSON schema allows, for as much of JSON schema as our own document has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from hypothesis import strategies as st

ITEMS_MAX: Final = 3
_TEXTS: Final = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_ANYTHING: Final = st.one_of(
    st.none(), st.booleans(), st.integers(-9, 9), _TEXTS, st.just([]), st.just({}), st.just(["x"])
)


def inlined(document: Mapping[str, Any], schema: Any) -> Any:
    """Without references; none may lead back to itself."""
    if isinstance(schema, list):
        return [inlined(document, one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return inlined(document, document["components"]["schemas"][schema["$ref"].rpartition("/")[2]])
    return {name: inlined(document, value) for name, value in schema.items()}


def values_of(schema: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    for alternatives in ("anyOf", "oneOf"):
        if alternatives in schema:
            common = {name: value for name, value in schema.items() if name != alternatives}
            return st.one_of([values_of(_both(common, one)) for one in schema[alternatives]])
    kinds = schema.get("type")
    if kinds is None:
        return _ANYTHING
    return st.one_of([_OF_TYPE[kind](schema) for kind in ([kinds] if isinstance(kinds, str) else kinds)])


def _both(common: Mapping[str, Any], one: Mapping[str, Any]) -> dict[str, Any]:
    return {**common, **one, "required": [*common.get("required", ()), *one.get("required", ())]}


def _text(schema: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    shortest = schema.get("minLength", 0)
    longest = max(shortest, min(schema.get("maxLength", 12), 12))
    return st.text(st.characters(exclude_categories=["Cs"]), min_size=shortest, max_size=longest)


def _integer(schema: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    """Small ones mostly, and the limits themselves."""
    low, high = schema.get("minimum", -(2**63)), schema.get("maximum", 2**63)
    small = st.integers(low, min(high, max(low, 4)))
    return st.one_of(small, small, st.sampled_from([low, high]) if "maximum" in schema else small)


def _number(schema: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    return st.floats(schema.get("minimum"), schema.get("maximum"), allow_nan=False, allow_infinity=False)


def _array(schema: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    shortest = schema.get("minItems", 0)
    longest = max(shortest, min(schema.get("maxItems", ITEMS_MAX), ITEMS_MAX))
    return st.lists(values_of(schema.get("items", {})), min_size=shortest, max_size=longest)


@st.composite
def _object(draw: st.DrawFn, schema: Mapping[str, Any]) -> dict[str, Any]:
    """What is required, and at most three of the rest: more together mostly contradict each other."""
    properties = schema.get("properties", {})
    required = schema.get("required", [])
    others = sorted(set(properties) - set(required))
    chosen = draw(st.lists(st.sampled_from(others), max_size=ITEMS_MAX, unique=True)) if others else []
    if not required and not chosen and schema.get("minProperties"):
        chosen = others[:1]
    value = {name: draw(values_of(properties.get(name, {}))) for name in (*required, *chosen)}
    if isinstance(more := schema.get("additionalProperties"), dict) and not properties:
        value |= draw(st.dictionaries(_TEXTS, values_of(more), max_size=ITEMS_MAX))
    return value


_OF_TYPE: Final = {
    "null": lambda schema: st.none(),
    "boolean": lambda schema: st.booleans(),
    "integer": _integer,
    "number": _number,
    "string": _text,
    "array": _array,
    "object": _object,
}
