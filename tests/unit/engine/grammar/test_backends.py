"""Both libraries mean the same by a grammar: texts, masks, ends, and taking tokens back."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from disaggregated.engine.grammar.api import Mask, Matcher
from disaggregated.engine.grammar.backends import Backends
from disaggregated.engine.grammar.bitmask import allows, full_mask
from disaggregated.engine.grammar.vocabulary import Vocabulary
from disaggregated.errors import GrammarRefused, ModelUnavailable
from disaggregated.grammar import Grammar, GrammarKind
from tests.support.grammar_vocabulary import END_ID, VOCAB_SIZE, ids_of, make_vocabulary, text_of

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tag": {"enum": ["x", "y"]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMA = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(PERSON))
OBJECT = Grammar(GrammarKind.JSON_OBJECT)
TEXTS = [
    (OBJECT, '{"a": 1, "b": [true, {"c": "d\\n é"}]}', '{"a":1}'),
    (OBJECT, "{}", "[1]"),
    (SCHEMA, '{"name": "Bob", "age": -12, "tag": "x"}', '{"name": "Bob", "tag": "x"}'),
    (SCHEMA, '{"name": "", "age": 0}', '{"age": 0, "name": ""}'),
    (SCHEMA, '{"name": "\\"", "age": 7}', '{"name": "", "age": 7, "else": 1}'),
    (Grammar(GrammarKind.REGEX, "[A-Z][a-z]{2,5}[0-9]+"), "Abc12", "Ab1"),
    (Grammar(GrammarKind.REGEX, "true|trab"), "trab", "abtr"),
    (Grammar(GrammarKind.CHOICE, '["yes", "no", "it\'s \\"both\\"", "ünd"]'), 'it\'s "both"', "maybe"),
    (Grammar(GrammarKind.CHOICE, '["yes", "no", "ünd"]'), "ünd", "yesno"),
    (Grammar(GrammarKind.EBNF, 'root ::= "a" [b-c]+ num\nnum ::= [0-9]{2}'), "abcb42", "a42"),
    (
        Grammar(GrammarKind.LARK, 'start: "<call>" %json {"type": "integer"} "</call>"'),
        "<call>12</call>",
        "<call>x</call>",
    ),
]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return make_vocabulary(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=["llguidance", "xgrammar"])
def backends(request: pytest.FixtureRequest, vocabulary: Vocabulary) -> Backends:
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    return Backends(request.param, vocabulary)


def mask_of(matcher: Matcher) -> Mask:
    mask = full_mask(VOCAB_SIZE)
    matcher.fill(mask)
    return mask


def allowed(matcher: Matcher) -> set[int]:
    mask = mask_of(matcher)
    return {token_id for token_id in range(VOCAB_SIZE) if allows(mask, token_id)}


def follow(matcher: Matcher, token_ids: Sequence[int]) -> bool:
    return all(allows(mask_of(matcher), token_id) and matcher.accept(token_id) for token_id in token_ids)


@pytest.mark.parametrize(("grammar", "text", "_"), TEXTS)
def test_a_text_of_the_grammar_is_allowed_token_by_token_and_may_end(
    backends: Backends, grammar: Grammar, text: str, _: str
) -> None:
    matcher = backends.compile(grammar).matcher()
    assert follow(matcher, ids_of(text))
    assert END_ID in allowed(matcher)


@pytest.mark.parametrize(("grammar", "_", "text"), TEXTS)
def test_no_other_text_is_allowed_to_its_end(backends: Backends, grammar: Grammar, _: str, text: str) -> None:
    matcher = backends.compile(grammar).matcher()
    assert not (follow(matcher, ids_of(text)) and END_ID in allowed(matcher))


@pytest.mark.parametrize(("grammar", "text", "_"), TEXTS)
def test_a_text_can_be_followed_in_other_tokens_too(backends: Backends, grammar: Grammar, text: str, _: str) -> None:
    """No mask insists on a tokenizer's own spelling, not even where the text has to be just this one."""
    matcher = backends.compile(grammar).matcher()
    assert follow(matcher, [token_id for character in text for token_id in ids_of(character)])
    assert END_ID in allowed(matcher)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("grammar", "text", "_"), TEXTS)
def test_tokens_that_are_taken_back_leave_no_trace(
    backends: Backends, grammar: Grammar, text: str, _: str, seed: int
) -> None:
    rng = random.Random(seed)
    matcher, fresh = backends.compile(grammar).matcher(), backends.compile(grammar).matcher()
    token_ids = ids_of(text)
    for position, token_id in enumerate(token_ids):
        ahead = token_ids[position : position + rng.randrange(4)]
        assert all(matcher.accept(each) for each in ahead)
        matcher.rollback(len(ahead))
        assert np.array_equal(mask_of(matcher), mask_of(fresh))
        assert matcher.accept(token_id)
        assert fresh.accept(token_id)


def test_a_refused_token_changes_nothing(backends: Backends) -> None:
    matcher = backends.compile(SCHEMA).matcher()
    assert follow(matcher, ids_of('{"name": "Bob'))
    before = allowed(matcher)
    assert not matcher.accept(ids_of("\n")[0])
    assert allowed(matcher) == before


def test_special_tokens_and_columns_without_a_token_are_never_allowed(backends: Backends) -> None:
    matcher = backends.compile(OBJECT).matcher()
    assert follow(matcher, ids_of('{"a": "'))
    assert max(allowed(matcher)) < END_ID


def test_two_texts_of_one_compiled_grammar_know_nothing_of_each_other(backends: Backends) -> None:
    compiled = backends.compile(SCHEMA)
    first, second = compiled.matcher(), compiled.matcher()
    assert follow(first, ids_of('{"name'))
    assert follow(second, ids_of('{"name": "x", "age": 3}'))
    assert compiled.num_bytes > 0


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar(GrammarKind.REGEX, "("),
        Grammar(GrammarKind.JSON_SCHEMA, '{"type": "nonsense"}'),
        Grammar(GrammarKind.JSON_SCHEMA, '{"$ref": "#/definitions/nothing"}'),
        Grammar(GrammarKind.EBNF, "root ::= nothing"),
        Grammar(GrammarKind.LARK, "start: nothing"),
    ],
)
def test_a_grammar_that_means_nothing_is_refused(backends: Backends, grammar: Grammar) -> None:
    with pytest.raises(GrammarRefused, match=r"^grammar: .") as caught:
        backends.compile(grammar)
    assert caught.value.param == "grammar"
    assert "/project/" not in str(caught.value)


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "string", "maxLength": 3}, '"abc"', '"abcd"'),
        ({"type": "string", "pattern": "^[a-c]+$"}, '"abc"', '"abd"'),
        ({"type": "integer", "multipleOf": 5}, "15", "16"),
        ({"oneOf": [{"type": "integer"}, {"type": "boolean"}], "x-guidance": {"coerce_one_of": True}}, "true", '"x"'),
        ({"allOf": [{"type": "integer"}, {"minimum": 3}]}, "4", "2"),
        ({"type": "string", "format": "date"}, '"2026-01-31"', '"2026-01-3"'),
    ],
)
def test_what_one_library_does_not_enforce_the_other_one_does(
    backends: Backends, schema: object, good: str, bad: str
) -> None:
    compiled = backends.compile(Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema)))
    matcher = compiled.matcher()
    assert follow(matcher, ids_of(good))
    assert END_ID in allowed(matcher)
    matcher = compiled.matcher()
    assert not (follow(matcher, ids_of(bad)) and END_ID in allowed(matcher))


@pytest.mark.parametrize("seed", range(20))
def test_whatever_masks_allow_is_json_of_the_schema(backends: Backends, seed: int) -> None:
    rng = random.Random(seed)
    matcher = backends.compile(SCHEMA).matcher()
    token_ids: list[int] = []
    while True:
        choices = sorted(allowed(matcher))
        assert choices, f"nothing may follow {text_of(token_ids)!r}"
        if END_ID in choices:
            break
        closing = [each for each in choices if text_of([each]) in ('"', "0", "}")] if len(token_ids) > 40 else []
        token_ids.append(rng.choice(closing or choices))
        assert matcher.accept(token_ids[-1])
        assert len(token_ids) < 200, text_of(token_ids)
    person = json.loads(text_of(token_ids))
    assert set(person) <= {"name", "age", "tag"}
    assert type(person["name"]) is str
    assert type(person["age"]) is int


def test_a_model_that_names_no_end_of_text_has_no_grammars(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelUnavailable, match="no eos_token_id"):
        Vocabulary.of_model(tmp_path, 300)


def test_a_model_with_fewer_columns_than_tokens_has_masks_of_its_own_size(tmp_path: Path, backends: Backends) -> None:
    small = Backends(backends.preference, make_vocabulary(tmp_path, vocab_size=280))
    mask = np.zeros(9, dtype=np.int32)
    with pytest.raises(ModelUnavailable, match="no eos_token_id"):
        Vocabulary.of_model(tmp_path, 200)
    matcher = small.compile(OBJECT).matcher()
    matcher.fill(mask)
    assert allows(mask, ids_of("{")[0])
