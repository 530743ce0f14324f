"""A Lark grammar without recursion, as one regular expression of the texts that it has.

A grammar library follows a Lark grammar through plain text. Within a JSON string, where a line's end is two characters
and a quote is too, it can follow a regular expression only. Most grammars of tools' inputs (patches, dates, commands)
are no more than that: each rule can be written where it is named.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Final, NamedTuple

REGEX_CHARACTERS_MAX: Final = 64 << 10
_WRITTEN_MAX: Final = 1 << 20
"""Characters of all rules together, each written out."""
_DEPTH_MAX: Final = 100
"""Of rules within rules, and of brackets within brackets."""

_TOKENS: Final = re.compile(
    r"""
    (?P<comment>(?://|\#)[^\n]*) | (?P<line>\n\s*) | (?P<space>[ \t\r\f]+)
    | (?P<string>"(?:[^"\\\n]|\\.)*"i?) | (?P<regex>/(?:[^/\\\n]|\\.)+/[a-z]*)
    | (?P<name>[?!]?[A-Za-z_]\w*(?:-\w+)*) | (?P<number>\d+) | (?P<directive>%\w+)
    | (?P<sign>->|\.\.|[:|()\[\]{}?*+~.,])
    """,
    re.VERBOSE,
)
_COMMON: Final = {
    "DIGIT": "[0-9]",
    "HEXDIGIT": "[0-9a-fA-F]",
    "INT": "[0-9]+",
    "SIGNED_INT": "[+-]?[0-9]+",
    "DECIMAL": r"(?:[0-9]+\.[0-9]*|\.[0-9]+)",
    "FLOAT": r"(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|[0-9]+[eE][+-]?[0-9]+)",
    "SIGNED_FLOAT": r"[+-]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|[0-9]+[eE][+-]?[0-9]+)",
    "NUMBER": r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?",
    "SIGNED_NUMBER": r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?",
    "LCASE_LETTER": "[a-z]",
    "UCASE_LETTER": "[A-Z]",
    "LETTER": "[A-Za-z]",
    "WORD": "[A-Za-z]+",
    "CNAME": "[_A-Za-z][_A-Za-z0-9]*",
    "ESCAPED_STRING": r'"(?:[^"\\\n]|\\.)*"',
    "WS_INLINE": r"[ \t]+",
    "WS": r"[ \t\f\r\n]+",
    "CR": r"\r",
    "LF": r"\n",
    "NEWLINE": r"(?:\r?\n)+",
}
"""What `%import common.NAME` means."""
_SPELLED: Final = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}
_MEANING: Final = frozenset(r"\.+*?()|[]{}^$")
"""Letters that mean something else in a regular expression."""


class NotRegular(ValueError):
    """No regular expression is made of this grammar; says why."""


class _Token(NamedTuple):
    kind: str
    text: str


class _Ref(NamedTuple):
    """To a rule or terminal, in the place of its text."""

    name: str


_Part = str | _Ref


def regex_of_lark(text: str) -> str:
    """Of the whole text, without anchors.

    Raises:
        NotRegular: it is recursive, too long once it is written out, or has what is not known here.
    """
    rules = _Reader(text).rules()
    if "start" not in rules:
        raise NotRegular("there is no rule called start")
    return _Writer(rules).written("start")


def _tokens(text: str) -> Iterator[_Token]:
    at = 0
    while at < len(text):
        found = _TOKENS.match(text, at)
        if found is None or found.lastgroup is None:
            raise NotRegular(f"{text[at : at + 20]!r} is not known")
        at = found.end()
        if found.lastgroup not in ("comment", "space"):
            yield _Token(found.lastgroup, found[0])
    yield _Token("line", "")


class _Reader:
    """Reads rules into parts of regular expressions, by recursive descent."""

    def __init__(self, text: str) -> None:
        self._tokens = [*_tokens(text)]
        self._at = 0
        self._rules: dict[str, list[_Part]] = {}
        self._depth = 0

    def rules(self) -> dict[str, list[_Part]]:
        while self._at < len(self._tokens):
            token = self._take()
            if token.kind == "directive":
                self._import(token.text)
            elif token.kind == "name":
                self._rule(token.text.lstrip("?!"))
            elif token.kind != "line":
                raise NotRegular(f"no rule begins with {token.text!r}")
        return self._rules

    def _peek(self) -> _Token:
        return self._tokens[self._at] if self._at < len(self._tokens) else _Token("end", "")

    def _take(self) -> _Token:
        token = self._peek()
        self._at += 1
        return token

    def _takes(self, sign: str) -> bool:
        token = self._peek()
        is_it = token.kind in ("sign", "name") and token.text == sign
        self._at += is_it
        return is_it

    def _expect(self, sign: str) -> None:
        if not self._takes(sign):
            raise NotRegular(f"{sign!r} is expected where {self._peek().text!r} stands")

    def _import(self, directive: str) -> None:
        if directive != "%import":
            raise NotRegular(f"{directive} cannot be written as a regular expression here")
        self._expect("common")
        if self._takes("."):
            name = self._take().text
            self._common(name, self._take().text if self._takes("->") else name)
            return
        self._expect("(")
        while not self._takes(")"):
            name = self._take().text
            self._common(name, name)
            self._takes(",")

    def _common(self, name: str, alias: str) -> None:
        if name not in _COMMON:
            raise NotRegular(f"common.{name} is not known")
        self._rules[alias] = [_COMMON[name]]

    def _rule(self, name: str) -> None:
        if self._takes("."):
            self._take()
        if self._peek().text in ("[", "{"):
            raise NotRegular(f"the options of {name} are not known here")
        self._expect(":")
        if name in self._rules:
            raise NotRegular(f"{name} is there twice")
        self._rules[name] = self._alternatives()

    def _alternatives(self) -> list[_Part]:
        parts = self._sequence()
        while self._continues_with_another():
            parts += ["|", *self._sequence()]
        return parts

    def _continues_with_another(self) -> bool:
        """An alternative may begin on the next line."""
        at = self._at
        while self._peek().kind == "line":
            self._at += 1
        if self._takes("|"):
            return True
        self._at = at
        return False

    def _sequence(self) -> list[_Part]:
        parts: list[_Part] = []
        while (atom := self._atom()) is not None:
            parts += ["(?:", *atom, ")", self._quantifier()]
        if self._takes("->"):
            self._take()
        return parts

    def _atom(self) -> list[_Part] | None:
        token = self._peek()
        if token.text in ("(", "[") and token.kind == "sign":
            self._take()
            inside = self._inside()
            self._expect(")" if token.text == "(" else "]")
            return inside if token.text == "(" else ["(?:", *inside, ")?"]
        if token.kind not in ("string", "regex", "name"):
            return None
        self._take()
        if token.kind == "name":
            return [_Ref(token.text)]
        if token.kind == "regex":
            return [_flagged(*token.text[1:].rsplit("/", 1))]
        return [_range(token.text, self._take()) if self._takes("..") else _literal(token.text)]

    def _inside(self) -> list[_Part]:
        self._depth += 1
        if self._depth > _DEPTH_MAX:
            raise NotRegular(f"its brackets are nested deeper than {_DEPTH_MAX} levels")
        inside = self._alternatives()
        while self._peek().kind == "line":
            self._take()
        self._depth -= 1
        return inside

    def _quantifier(self) -> str:
        for sign in "?*+":
            if self._takes(sign):
                return sign
        if self._takes("~"):
            low = high = self._number()
            if self._takes(".."):
                high = self._number()
            return f"{{{low},{high}}}"
        if not self._takes("{"):
            return ""
        counts = ""
        while not self._takes("}"):
            counts += "," if self._takes(",") else self._number()
        return f"{{{counts}}}"

    def _number(self) -> str:
        token = self._take()
        if token.kind != "number":
            raise NotRegular(f"a number is expected where {token.text!r} stands")
        return token.text


class _Writer:
    """Writes each rule where it is named, and each one once."""

    def __init__(self, rules: dict[str, list[_Part]]) -> None:
        self._rules = rules
        self._done: dict[str, str] = {}
        self._open: set[str] = set()
        self._num_written = 0

    def written(self, name: str) -> str:
        if name in self._done:
            return self._done[name]
        if name in self._open:
            raise NotRegular(f"{name} is recursive")
        if name not in self._rules:
            raise NotRegular(f"there is no {name}")
        if len(self._open) > _DEPTH_MAX:
            raise NotRegular(f"its rules are nested deeper than {_DEPTH_MAX} levels")
        self._open.add(name)
        text = ""
        for part in self._rules[name]:
            text += self.written(part.name) if isinstance(part, _Ref) else part
            if len(text) > REGEX_CHARACTERS_MAX:
                raise NotRegular(f"written out it has more than {REGEX_CHARACTERS_MAX} characters")
        self._num_written += len(text)
        if self._num_written > _WRITTEN_MAX:
            raise NotRegular(f"its rules, written out, have more than {_WRITTEN_MAX} characters")
        self._open.remove(name)
        self._done[name] = text
        return text


def _literal(token: str) -> str:
    is_quoted = token.endswith('"')
    text = _spelled(token if is_quoted else token[:-1])
    escaped = "".join(_SPELLED.get(letter, f"\\{letter}" if letter in _MEANING else letter) for letter in text)
    return escaped if is_quoted else f"(?i:{escaped})"


def _spelled(token: str) -> str:
    try:
        return str(json.loads(token))
    except ValueError as error:
        raise NotRegular(f"{token[:40]} is not spelled as JSON spells texts") from error


def _range(first: str, last: _Token) -> str:
    ends = [_spelled(text) for text in (first, last.text) if text.startswith('"') and text.endswith('"')]
    if len(ends) != 2 or not all(len(end) == 1 and end.isalnum() for end in ends):
        raise NotRegular(f"{first}..{last.text} is not a range of letters or digits")
    return f"[{ends[0]}-{ends[1]}]"


def _flagged(pattern: str, flags: str) -> str:
    if set(flags) - set("isu"):
        raise NotRegular(f"the flags {flags!r} of /{pattern[:40]}/ are not known here")
    flags = "".join(sorted(set(flags) - {"u"}))
    return f"(?{flags}:{pattern})" if flags else pattern
