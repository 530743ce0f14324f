"""A Lark grammar and the regular expression that is made of it have the same texts."""

from __future__ import annotations

import re
from typing import Final

import pytest

from disaggregated.grammar import Grammar, GrammarKind
from disaggregated.structured.lark_regex import REGEX_CHARACTERS_MAX, NotRegular, regex_of_lark
from tests.support.followed import EXPRESSION_GRAMMAR, NO_PATCHES, PATCH, PATCH_GRAMMAR, is_followed

CASES: Final[list[tuple[str, list[str], list[str]]]] = [
    ('start: "a" | "b" "c"', ["a", "bc"], ["ac", "b", "abc", ""]),
    ('start: ("x" "y"?)+ "."', ["x.", "xyx."], ["y.", ".", "xyy."]),
    ('start: "a"~2 B{1,} C{2} D{0,1}\nB: "b"\nC: "c"\nD: "d"', ["aabcc", "aabbccd"], ["abcc", "aacc", "aabccdd"]),
    ('start: "a"~1..3', ["a", "aaa"], ["", "aaaa"]),
    ('start: ["-"] INT\n%import common.INT', ["5", "-50"], ["--5", "-", ""]),
    (
        'start: NAME " = " (NUM | NAME)\n%import common (CNAME, NUMBER)\nNAME: CNAME\nNUM: NUMBER',
        ["a = 1.5"],
        ["1 = a"],
    ),
    ("%import common.WORD -> W\nstart: W", ["abc"], ["a1"]),
    ("start: /[a-z]+/i", ["aBc"], ["a1"]),
    ('start: "select"i " " /./s', ["SELECT \n", "select x"], ["selec x"]),
    ('start: "a".."f" "0".."3"', ["b2"], ["g1", "b4"]),
    (r'start: "\"\\\n." /\/x/', ['"\\\n./x'], ['"\\n.x']),
    ('start: "[a]*(b)?{1}^$|+"', ["[a]*(b)?{1}^$|+"], ["a", "[a"]),
    ('?start: one\n!one: two // said\n\n  | three # so\ntwo: "2"\nthree: "3"', ["2", "3"], ["23"]),
    ('start: ("a"\n  | "b")', ["a", "b"], ["ab"]),
    ('start: "ü😀"', ["ü😀"], ["ü"]),
    (PATCH_GRAMMAR, [PATCH], [*NO_PATCHES]),
]


@pytest.mark.parametrize(("lark", "texts", "others"), CASES, ids=[case[0][:30] for case in CASES])
def test_it_has_the_texts_of_the_grammar_and_no_others(lark: str, texts: list[str], others: list[str]) -> None:
    whole, regex = Grammar(GrammarKind.LARK, lark), Grammar(GrammarKind.REGEX, regex_of_lark(lark))
    for text in (*texts, *others):
        assert is_followed(regex, text) == is_followed(whole, text) == (text in texts), text


def test_lark_s_own_spelling_is_read_where_a_library_reads_less() -> None:
    assert re.fullmatch(regex_of_lark('start.2: ("a"\n  | "b"\n)'), "b")


def test_what_is_recursive_is_none() -> None:
    with pytest.raises(NotRegular, match="expr is recursive"):
        regex_of_lark(EXPRESSION_GRAMMAR)


@pytest.mark.parametrize(
    ("lark", "why"),
    [
        ("", "there is no rule called start"),
        ("x", "':' is expected"),
        ("start: missing", "there is no missing"),
        ('start: "a"\nstart: "b"', "start is there twice"),
        ('start: "a"\n%ignore " "', "%ignore cannot be written"),
        ('start: %json {"type": "object"}', "no rule begins with|is not known|cannot be written"),
        ("start: <|tool|>", "is not known"),
        ("start: @other", "is not known"),
        ('start[lazy]: "a"', "the options of start"),
        ('start{x}: "a"', "the options of start"),
        ("%import common.NOTHING\nstart: NOTHING", "common.NOTHING is not known"),
        ("%import python.INT\nstart: INT", "'common' is expected"),
        ("start: /a/x", "the flags 'x'"),
        (r'start: "\d"', "is not spelled as JSON"),
        (r'start: "\d".."z"', "is not spelled as JSON"),
        ('start: "ab".."c"', "is not a range"),
        ('start: ("a"', r"'\)' is expected"),
        ('start: "a"~b', "a number is expected where 'b'"),
        ("start: " + "(" * 5000 + '"a"' + ")" * 5000, "brackets are nested deeper than 100"),
        ("\n".join(["start: r0", *(f"r{i}: r{i + 1}" for i in range(300)), 'r300: "a"']), "nested deeper than 100"),
        ('start: a a a a a a a a\na: "' + "x" * 10_000 + '"', f"more than {REGEX_CHARACTERS_MAX}"),
        (
            "\n".join([f"start: {'r0'}", *(f"r{i}: BIG r{i + 1}?" for i in range(60)), "r60: BIG"])
            + f'\nBIG: "{"x" * 1000}"\n',
            "more than 1048576",
        ),
    ],
)
def test_what_cannot_be_written_so_is_told_why(lark: str, why: str) -> None:
    with pytest.raises(NotRegular, match=why):
        regex_of_lark(lark)


def test_doubling_rules_are_stopped_before_they_fill_the_memory() -> None:
    rules = [f"r{i}: r{i + 1} r{i + 1}" for i in range(80)]
    with pytest.raises(NotRegular, match="written out"):
        regex_of_lark("\n".join(["start: r0", *rules, 'r80: "a"']))


def test_it_is_an_expression_that_python_knows_too() -> None:
    assert re.fullmatch(regex_of_lark(PATCH_GRAMMAR), PATCH)
