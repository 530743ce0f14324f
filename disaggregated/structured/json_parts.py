"""How much there is in a JSON text, before it is parsed.

A parser holds the interpreter until it is through, so a thread is of no help: what it takes has to be bounded. A long
string costs next to nothing; the parts that JSON is made of cost each about the same. They are counted here slice by
slice, so that on a thread other threads go on meanwhile.
"""

from __future__ import annotations

from typing import Final

from disaggregated.errors import InvalidRequest

PARTS_MAX: Final = 1 << 20
"""A million token ids. So many take about 50 ms."""
MEMBER_WEIGHT: Final = 10
"""Of an object, an array, or a member of an object: to make one takes as long as ten numbers."""
UNCOUNTED_BYTES_MAX: Final = PARTS_MAX // MEMBER_WEIGHT * 2
"""A shorter text cannot have so many: what weighs most for its length is an array in an array, of two brackets."""
_SLICE_BYTES: Final = 1 << 16
_NOT_COUNTED: Final = bytes(set(range(256)) - set(b'{[:,."'))


def check_num_parts(json: bytes, name: str, *, param: str | None = None, num_max: int = PARTS_MAX) -> None:
    """`name`: what the text is called where it is refused. Of what is not JSON, the parts count that a parser sees
    before it finds out.

    Raises:
        InvalidRequest: there are more than `num_max`.
    """
    if len(json) <= num_max // MEMBER_WEIGHT * 2:
        return
    if _num_parts_at_most(json) > num_max and (num_parts := _num_parts_outside_of_strings(json)) > num_max:
        raise InvalidRequest(
            f"{name} has {num_parts} JSON values, the limit is {num_max}: an object, an array and a member of an "
            f"object count as {MEMBER_WEIGHT} each",
            param=param,
        )


def _num_parts_at_most(json: bytes) -> int:
    """As if there were no strings, in which the same characters mean nothing."""
    return sum(_num_parts(json[begin : begin + _SLICE_BYTES]) for begin in range(0, len(json), _SLICE_BYTES))


def _num_parts(json: bytes) -> int:
    signs = json.translate(None, _NOT_COUNTED)
    members = signs.count(b"{") + signs.count(b"[") + signs.count(b":")
    # A string has two quotes. A point makes a number one of the slow kind.
    return MEMBER_WEIGHT * members + signs.count(b",") + signs.count(b".") + signs.count(b'"') // 2


def _num_parts_outside_of_strings(json: bytes) -> int:
    num_parts = num_quotes = begin = 0
    while begin < len(json):
        end = _after_escapes(json, begin, begin + _SLICE_BYTES)
        between_quotes = json[begin:end].replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        num_parts += _num_parts(b"".join(between_quotes[num_quotes % 2 :: 2]))
        num_quotes += len(between_quotes) - 1
        begin = end
    return num_parts + num_quotes // 2


def _after_escapes(json: bytes, begin: int, end: int) -> int:
    """Where a slice may end: not between a backslash and what it escapes."""
    before = json[begin:end]
    return end + (len(before) - len(before.rstrip(b"\\"))) % 2
