"""JSON is counted before it is parsed: exactly, whatever its strings hold, and wherever slices end."""

from __future__ import annotations

import random
from typing import Any, Final

import orjson
import pytest

from disaggregated.errors import InvalidRequest
from disaggregated.structured import json_parts
from disaggregated.structured.json_parts import MEMBER_WEIGHT, PARTS_MAX, UNCOUNTED_BYTES_MAX, check_num_parts

TEXTS: Final = ("", "a", '"', "\\", '\\"', "\\\\", '[{:,."', "x" * 50, "\\" * 31, "é\n", '{"a":[1,2.5]}' * 3)


def drawn(draw: random.Random, depth: int = 0) -> Any:
    kind = draw.randrange(6 if depth < 4 else 4)
    match kind:
        case 0:
            return draw.choice((0, -5, 123456, None, True))
        case 1:
            return draw.choice((0.5, 12.25))
        case 2 | 3:
            return "".join(draw.choices(TEXTS, k=3))
        case 4:
            return [drawn(draw, depth + 1) for _ in range(draw.randrange(6))]
        case _:
            return {f"{index}{draw.choice(TEXTS)}": drawn(draw, depth + 1) for index in range(draw.randrange(6))}


def counted(value: Any) -> int:
    """What the module's docstring says, of the value itself; a comma stands between two members."""
    match value:
        case str():
            return 1
        case float():
            return 1
        case list():
            return MEMBER_WEIGHT + sum(map(counted, value)) + max(0, len(value) - 1)
        case dict():
            of_keys = len(value) * (MEMBER_WEIGHT + 1)
            return MEMBER_WEIGHT + of_keys + sum(map(counted, value.values())) + max(0, len(value) - 1)
    return 0


@pytest.mark.parametrize("seed", range(40))
def test_strings_are_told_from_what_is_around_them(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    values = [drawn(draw) for _ in range(40)]
    monkeypatch.setattr(json_parts, "_SLICE_BYTES", draw.choice((2, 3, 7, 64, 1 << 16)))
    json, expected = orjson.dumps(values), counted(values)
    check_num_parts(json, "it", num_max=expected)
    with pytest.raises(InvalidRequest, match=f"it has {expected} JSON values, the limit is {expected - 1}:") as refused:
        check_num_parts(json, "it", param="its name", num_max=expected - 1)
    assert refused.value.param == "its name"


def test_what_is_short_has_few_parts_whatever_they_are() -> None:
    num_brackets = UNCOUNTED_BYTES_MAX // 2
    assert num_brackets * MEMBER_WEIGHT <= PARTS_MAX
    check_num_parts(b"[" * num_brackets + b"]" * num_brackets, "it")
    with pytest.raises(InvalidRequest):
        check_num_parts(b"[" * (num_brackets + 1) + b"]" * (num_brackets + 1), "it")


def test_a_million_token_ids_are_not_too_many() -> None:
    check_num_parts(orjson.dumps({"model": "m", "prompt": [123456] * 1_000_000}), "it")


def test_a_long_text_counts_as_one() -> None:
    check_num_parts(orjson.dumps({"prompt": '{"a": [1, 2.5]}, ' * 300_000}), "it")
