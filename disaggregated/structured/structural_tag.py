"""Structural tags: text that is free but for what stands between tags. XGrammar's form of it, made into Lark.

    {"type": "triggered_tags", "triggers": ["<f="],
     "tags": [{"begin": "<f=weather>", "content": {"type": "json_schema", "json_schema": {…}}, "end": "</f>"}]}

A trigger is looked for in free text, lazily: where its last character is read, one of its tags has begun.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from disaggregated.errors import InvalidRequest
from disaggregated.grammar import Grammar, GrammarKind
from disaggregated.structured.grammar_text import SEPARATORS
from disaggregated.structured.json_schema import DEPTH_MAX, is_deeper, schema_text
from disaggregated.structured.json_type import wrong_type

TAGS_MAX: Final = 256
TEXT_BYTES_MAX: Final = 64 << 10
SOURCE_CHARACTERS_MAX: Final = 4 * TEXT_BYTES_MAX
_TEXT: Final = r"/(.|\n)*/"
_JSON: Final = {"item_separator": SEPARATORS[0], "key_separator": SEPARATORS[1], "whitespace_flexible": False}


def read_structural_tag(value: Any, name: str) -> Grammar:
    """`value` is XGrammar's `{"format": {…}}`, or the older `{"structures": […], "triggers": […]}`; or JSON of either.

    Raises:
        InvalidRequest: names the part that is wrong, or of a kind that does not exist here.
    """
    if isinstance(value, str):
        if len(value) > SOURCE_CHARACTERS_MAX:
            raise InvalidRequest(
                f"{name} has {len(value)} characters, the limit is {SOURCE_CHARACTERS_MAX}", param=name
            )
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"{name} is not valid JSON: {error}", param=name) from error
    if not isinstance(value, dict):
        raise wrong_type(name, "an object", value)
    if is_deeper(value, DEPTH_MAX):
        raise InvalidRequest(f"{name} is nested deeper than {DEPTH_MAX} levels", param=name)
    lark = _Lark()
    if value.get("format") is not None:
        lark.rule("start", lark.expression(value["format"], f"{name}.format"))
    else:
        tags = [
            _of_older_form(tag, f"{name}.structures[{i}]") for i, tag in enumerate(_list(value, "structures", name))
        ]
        lark.rule("start", lark.triggered({**value, "tags": tags}, name))
    text = "\n".join(lark.rules)
    if (num_bytes := len(text.encode(errors="replace"))) > TEXT_BYTES_MAX:
        raise InvalidRequest(f"{name} makes a grammar of {num_bytes} bytes, the limit is {TEXT_BYTES_MAX}", param=name)
    return Grammar(GrammarKind.LARK, text)


def _of_older_form(tag: Any, name: str) -> dict[str, Any]:
    if not isinstance(tag, dict):
        raise wrong_type(name, "an object", tag)
    schema = {"type": "json_schema", "json_schema": tag.get("schema") or {}}
    return {"begin": tag.get("begin"), "content": schema, "end": tag.get("end")}


class _Lark:
    """Rules, the ones that others need after them."""

    def __init__(self) -> None:
        self.rules: list[str] = []
        self._num_rules = 0

    def rule(self, name: str, expression: str) -> str:
        self.rules.append(f"{name}: {expression}")
        return name

    def _new_name(self) -> str:
        self._num_rules += 1
        return f"part_{self._num_rules}"

    def expression(self, value: Any, name: str) -> str:
        if not isinstance(value, dict):
            raise wrong_type(name, "an object", value)
        kind = value.get("type")
        write = _KINDS.get(kind) if isinstance(kind, str) else None
        if write is None:
            raise InvalidRequest(
                f"{name}.type must be one of {', '.join(_KINDS)}; is {str(kind)[:80]!r}", param=f"{name}.type"
            )
        return write(self, value, name)

    def constant(self, value: Mapping[str, Any], name: str) -> str:
        return _quoted(_string(value, "value", name))

    def regex(self, value: Mapping[str, Any], name: str) -> str:
        return f"/{_escaped(_string(value, 'pattern', name))}/"

    def any_text(self, _: Mapping[str, Any], __: str) -> str:
        return _TEXT

    def sequence(self, value: Mapping[str, Any], name: str) -> str:
        return " ".join(self._all(value, "elements", name))

    def one_of(self, value: Mapping[str, Any], name: str) -> str:
        return f"({' | '.join(self._all(value, 'elements', name))})"

    def repeated(self, value: Mapping[str, Any], name: str) -> str:
        times = {"optional": "?", "plus": "+", "star": "*"}[value["type"]]
        return f"({self.expression(value.get('content'), f'{name}.content')}){times}"

    def tag(self, value: Mapping[str, Any], name: str) -> str:
        return f"{_any_of(_strings(value, 'begin', name))} {self._rest(value, name)}"

    def triggered(self, value: Mapping[str, Any], name: str) -> str:
        """Free text, and tags where triggers are found in it."""
        triggers, tags = _strings(value, "triggers", name), _list(value, "tags", name)
        by_trigger: dict[str, list[str]] = {trigger: [] for trigger in triggers}
        for index, tag in enumerate(tags):
            where = f"{name}.tags[{index}]"
            for begin in _strings(tag, "begin", where):
                trigger = next((each for each in triggers if begin.startswith(each)), None)
                if trigger is None:
                    raise InvalidRequest(f"{where}.begin begins with no trigger", param=where)
                by_trigger[trigger].append(f"{_quoted(begin[len(trigger) :])} {self._rest(tag, where)}")
        found = []
        for trigger, rests in by_trigger.items():
            if rests:
                begun = self.rule(f"{self._new_name()}[lazy]", f"{_TEXT} {_quoted(trigger)}").partition("[")[0]
                found.append(f"{begun} ({' | '.join(rests)})")
        tag = f"({' | '.join(found)})"
        times = "" if value.get("stop_after_first") is True else "+"
        after = "" if value.get("stop_after_first") is True else self.rule(self._new_name(), _TEXT)
        tagged = f"{tag}{times} {after}"
        return tagged if value.get("at_least_one") is True else f"({tagged} | {_TEXT})"

    def separated(self, value: Mapping[str, Any], name: str) -> str:
        tags = [{**tag, "type": "tag"} if isinstance(tag, dict) else tag for tag in _list(value, "tags", name)]
        tag = self.rule(self._new_name(), " | ".join(self._all({"tags": tags}, "tags", name)))
        separator = _quoted(_string(value, "separator", name))
        several = tag if value.get("stop_after_first") is True else f"{tag} ({separator} {tag})*"
        return several if value.get("at_least_one") is True else f"({several})?"

    def _rest(self, tag: Mapping[str, Any], name: str) -> str:
        """A tag's content and its end."""
        content, ends = tag.get("content"), _strings(tag, "end", name)
        if isinstance(content, dict) and content.get("type") == "any_text" and all(ends):
            return self.rule(f"{self._new_name()}[lazy]", f"{_TEXT} {_any_of(ends)}").partition("[")[0]
        return f"{self.expression(content, f'{name}.content')} {_any_of(ends)}"

    def json_schema(self, value: Mapping[str, Any], name: str) -> str:
        schema = value.get("json_schema")
        text = schema_text({} if schema is True else schema, f"{name}.json_schema")
        told = {**json.loads(text), "x-guidance": {**_JSON, "lenient": True}}
        return self.rule(self._new_name(), f"%json {json.dumps(told)}")

    def _all(self, value: Mapping[str, Any], key: str, name: str) -> list[str]:
        return [self.expression(one, f"{name}.{key}[{index}]") for index, one in enumerate(_list(value, key, name))]


_KINDS: Final[Mapping[str, Callable[[_Lark, Mapping[str, Any], str], str]]] = {
    "const_string": _Lark.constant,
    "json_schema": _Lark.json_schema,
    "regex": _Lark.regex,
    "any_text": _Lark.any_text,
    "sequence": _Lark.sequence,
    "or": _Lark.one_of,
    "optional": _Lark.repeated,
    "plus": _Lark.repeated,
    "star": _Lark.repeated,
    "tag": _Lark.tag,
    "triggered_tags": _Lark.triggered,
    "tags_with_separator": _Lark.separated,
}


def _list(value: Mapping[str, Any], key: str, name: str) -> list[Any]:
    found = value.get(key)
    if not isinstance(found, list):
        raise wrong_type(f"{name}.{key}", "an array", found)
    if not 1 <= len(found) <= TAGS_MAX:
        raise InvalidRequest(f"{name}.{key} has {len(found)} entries, it must have 1 to {TAGS_MAX}", param=name)
    return found


def _string(value: Mapping[str, Any], key: str, name: str) -> str:
    (text,) = _strings({key: [value.get(key)]}, key, name)
    return text


def _strings(value: Any, key: str, name: str) -> Sequence[str]:
    """One, or an array of them."""
    found = value.get(key) if isinstance(value, dict) else None
    many = [found] if isinstance(found, str) else found
    if not isinstance(many, list) or not many or not all(isinstance(one, str) for one in many):
        raise wrong_type(f"{name}.{key}", "a string or an array of strings", found)
    if any(not one.isascii() and any("\ud800" <= letter <= "\udfff" for letter in one) for one in many):
        raise InvalidRequest(f"{name}.{key} has half of a surrogate pair", param=name)
    return many


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _any_of(texts: Sequence[str]) -> str:
    return _quoted(texts[0]) if len(texts) == 1 else f"({' | '.join(map(_quoted, texts))})"


def _escaped(pattern: str) -> str:
    """A slash would end it."""
    return pattern.replace("\\/", "/").replace("/", "\\/")
