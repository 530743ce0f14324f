"""What a value of a configuration key may be: each kind checks one value and says in words what is wrong with it.

A value comes from YAML (typed), or from a flag or an environment variable (text, read by the kind itself). `None` never
reaches a kind: a key without a value is a key left out.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from typing import Final

import yaml


class BadValue(ValueError):
    """The sentence's second half: "must be at least 1, is 0". The caller knows the key."""


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    words: str
    """For the documentation: "whole number, at least 1"."""
    check: Callable[[object], object]
    """Gives the value in its one canonical form, or raises BadValue."""
    is_text: bool = False
    """A flag's text is the value itself and is not read as YAML, so that a model may be called 1234."""

    def from_text(self, text: str) -> object:
        if self.is_text:
            return self.check(text)
        try:
            return self.check(yaml.safe_load(text))
        except yaml.YAMLError:
            raise BadValue(f"must be {self.words}, is {shown(text)}") from None


def shown(value: object) -> str:
    """A value as the reader wrote it, and never a screenful."""
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def in_words(names: tuple[str, ...] | list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def did_you_mean(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def integer(minimum: int | None = None, maximum: int | None = None) -> Kind:
    words = "a whole number" + _range_words(minimum, maximum)

    def check(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise BadValue(f"must be a whole number, is {shown(value)}")
        _check_range(value, minimum, maximum)
        return value

    return Kind(words, check)


def number(minimum: float | None = None, maximum: float | None = None) -> Kind:
    words = "a number" + _range_words(minimum, maximum)

    def check(value: object) -> float:
        if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text.
            try:
                value = float(value)
            except ValueError:
                raise BadValue(f"must be a number, is {shown(value)}") from None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise BadValue(f"must be a number, is {shown(value)}")
        _check_range(value, minimum, maximum)
        return float(value)

    return Kind(words, check)


def _range_words(minimum: float | None, maximum: float | None) -> str:
    if minimum is not None and maximum is not None:
        return f", {minimum} to {maximum}"
    if minimum is not None:
        return f", at least {minimum}"
    return "" if maximum is None else f", at most {maximum}"


def _check_range(value: float, minimum: float | None, maximum: float | None) -> None:
    too_small = minimum is not None and value < minimum
    too_large = maximum is not None and value > maximum
    if (too_small or too_large) and minimum is not None and maximum is not None:
        raise BadValue(f"must be between {minimum} and {maximum}, is {value}")
    if too_small:
        raise BadValue(f"must be at least {minimum}, is {value}")
    if too_large:
        raise BadValue(f"must be at most {maximum}, is {value}")


def _check_boolean(value: object) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise BadValue(f"must be true or false, is {shown(value)}")
    return value


def _check_text(value: object) -> str:
    if not isinstance(value, str):
        raise BadValue(f"must be text, is {shown(value)}")
    if not value.strip():
        raise BadValue("must not be empty")
    return value


def choice(*names: str, spellings: Mapping[str, str] | None = None, words: str = "") -> Kind:
    """One of `names`, in any case; `spellings` are other names that users bring for the same things.

    `words`: what the documentation and messages name instead of all `names`.
    """
    canonical = {name.lower(): name for name in names} | dict(spellings or {})
    words = words or in_words(names)

    def check(value: object) -> str:
        found = canonical.get(value.lower()) if isinstance(value, str) else None
        if found is None:
            hint = did_you_mean(str(value).lower(), list(canonical))
            raise BadValue(f"must be {words}, is {shown(value)}{hint}")
        return found

    return Kind(words, check, is_text=True)


def _check_address(value: object) -> str:
    """`host:port`; a scheme is dropped, since TensorRT-LLM users write one now and then."""
    text = _check_text(value).removeprefix("http://").removesuffix("/")
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or not 1 <= int(port) <= 65535:
        raise BadValue(f"must be host:port with a port from 1 to 65535, is {shown(value)}")
    return text


def _check_addresses(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise BadValue(f"must be a list of host:port, is {shown(value)}")
    urls = tuple(_check_address(item) for item in value)
    for position, url in enumerate(urls):
        if url in urls[:position]:
            raise BadValue(f"{url} is named twice")
    return urls


def _check_cores(value: object) -> tuple[int, ...]:
    """A list of core numbers, or taskset's spelling of one: "0,2-5"."""
    items = str(value).split(",") if isinstance(value, str | int) and not isinstance(value, bool) else value
    if not isinstance(items, list) or not items:
        raise BadValue(f"must be a list of cores such as 0,2-5, is {shown(value)}")
    cores: list[int] = []
    for item in items:
        first, dash, last = str(item).strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise BadValue(f"must be a list of cores such as 0,2-5, is {shown(value)}")
        cores.extend(range(int(first), int(last or first) + 1))
    if len(set(cores)) < len(cores):
        raise BadValue(f"names a core twice, is {shown(value)}")
    return tuple(cores)


def _check_counts(value: object) -> tuple[int, ...]:
    """A list of positive whole numbers, or "1,2,4"."""
    items = value.split(",") if isinstance(value, str) else value
    wrong = BadValue(f"must be a list of whole numbers, at least 1, is {shown(value)}")
    if not isinstance(items, list) or not items:
        raise wrong
    texts = [str(item).strip() for item in items]
    if not all(text.isdigit() and int(text) > 0 for text in texts):
        raise wrong
    return tuple(sorted({int(text) for text in texts}))


def _check_weights(value: object) -> Mapping[str, float]:
    """Names to numbers, none negative and one above 0."""
    wrong = BadValue(f"must be a section of names with a number from 0 on, one of them above 0, is {shown(value)}")
    if not isinstance(value, dict) or not value:
        raise wrong
    numbers = [each for each in value.values() if isinstance(each, int | float) and not isinstance(each, bool)]
    if len(numbers) < len(value) or not all(math.isfinite(each) and each >= 0 for each in numbers) or not any(numbers):
        raise wrong
    return {str(name): float(weight) for name, weight in value.items()}


def choices(*names: str) -> Kind:
    """A list of some of `names`, none twice."""
    words = f"a list of {in_words(names)}"

    def check(value: object) -> tuple[str, ...]:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list):
            raise BadValue(f"must be {words}, is {shown(value)}")
        texts = [str(item).strip() for item in items]
        for text in texts:
            if text not in names:
                raise BadValue(f"must be {words}, is {shown(value)}{did_you_mean(text, list(names))}")
        if len(set(texts)) < len(texts):
            raise BadValue(f"names one twice, is {shown(value)}")
        return tuple(texts)

    return Kind(words, check, is_text=True)


def _check_mapping(value: object) -> object:
    if not isinstance(value, dict):
        raise BadValue(f"must be a section of keys, is {shown(value)}")
    return value


BOOLEAN: Final = Kind("true or false", _check_boolean)
TEXT: Final = Kind("text", _check_text, is_text=True)
ADDRESSES: Final = Kind("a list of host:port", _check_addresses)
CORES: Final = Kind("a list of cores, or text such as 0,2-5", _check_cores, is_text=True)
COUNTS: Final = Kind("a list of whole numbers, or text such as 1,2,4", _check_counts, is_text=True)
WEIGHTS: Final = Kind("a section of names with a number each", _check_weights)
MAPPING: Final = Kind("a section of keys", _check_mapping)
ANYTHING: Final = Kind("anything", lambda value: value)
