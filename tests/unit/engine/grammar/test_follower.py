"""A sequence under a grammar: free text first, drafts tried and taken back, and an end only where there may be one."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import numpy as np
import pytest

from disaggregated.engine.grammar import follower as follower_module
from disaggregated.engine.grammar.api import Mask
from disaggregated.engine.grammar.backends import Backends
from disaggregated.engine.grammar.bitmask import allows, forbid, full_mask
from disaggregated.engine.grammar.follower import GrammarFollower
from disaggregated.engine.grammar.vocabulary import Vocabulary
from disaggregated.errors import GrammarRefused
from disaggregated.grammar import Grammar, GrammarKind
from tests.support.grammar_vocabulary import END_ID as EOS
from tests.support.grammar_vocabulary import THINK_END_ID as MARK
from tests.support.grammar_vocabulary import VOCAB_SIZE, ids_of, make_vocabulary

OBJECT = Grammar(GrammarKind.JSON_OBJECT)
DIGITS = Grammar(GrammarKind.REGEX, "[0-9]{1,3}")


@pytest.fixture(scope="module")
def backends(tmp_path_factory: pytest.TempPathFactory) -> Backends:
    return Backends("llguidance", make_vocabulary(tmp_path_factory.mktemp("model")))


def follower(backends: Backends, grammar: Grammar, starts_after: tuple[int, ...] = ()) -> GrammarFollower:
    return GrammarFollower(
        backends.compile(grammar).matcher(),
        starts_after=starts_after,
        eos_token_ids=[EOS],
        vocab_size=VOCAB_SIZE,
    )


def allowed(found: GrammarFollower, forbidden: frozenset[int] = frozenset()) -> set[int]:
    (mask,) = found.masks((), forbidden)
    return {token_id for token_id in range(VOCAB_SIZE) if allows(mask, token_id)}


def test_the_end_is_allowed_only_where_the_grammar_lets_the_text_end(backends: Backends) -> None:
    found = follower(backends, DIGITS)
    digits = set(ids_of("0123456789"))
    assert allowed(found) == digits
    assert found.follow(ids_of("12"))
    assert allowed(found) == digits | {EOS}
    assert found.follow(ids_of("3"))
    assert allowed(found) == {EOS}
    assert found.follow([EOS])
    assert found.num_followed == 4


def test_a_token_against_the_grammar_is_told_and_left_out(backends: Backends) -> None:
    found = follower(backends, DIGITS)
    assert not found.follow(ids_of("1a2"))
    assert found.num_followed == 1
    assert found.follow(ids_of("2"))


def test_an_end_that_must_not_come_yet_does_not_come_unless_nothing_else_can(backends: Backends) -> None:
    found = follower(backends, DIGITS)
    assert found.follow(ids_of("12"))
    assert allowed(found, frozenset({EOS})) == set(ids_of("0123456789"))
    assert found.follow(ids_of("3"))
    assert allowed(found, frozenset({EOS})) == {EOS}


@pytest.mark.parametrize("marker", [(MARK,), (MARK, *ids_of("ok")), tuple(ids_of("aab"))])
def test_the_text_is_free_up_to_the_tokens_after_which_the_grammar_starts(
    backends: Backends, marker: tuple[int, ...]
) -> None:
    found = follower(backends, DIGITS, marker)
    assert allowed(found) == set(range(VOCAB_SIZE)) - {EOS}
    assert found.follow(ids_of("I think, aa 12 {"))
    assert found.follow(marker[:-1])
    assert allowed(found) == set(range(VOCAB_SIZE)) - {EOS}
    assert found.follow(marker[-1:])
    assert allowed(found) == set(ids_of("0123456789"))


@pytest.mark.parametrize("seed", range(40))
def test_drafts_change_nothing_and_their_masks_are_those_of_following_them(backends: Backends, seed: int) -> None:
    """Whichever of them are wrong, also across the place where the grammar starts and where the text ends."""
    rng = random.Random(seed)
    text = [*ids_of("so"), MARK, *ids_of('{"ab": true, "b": 1}'), EOS, *ids_of("x")]
    found, alone = (follower(backends, OBJECT, (MARK,)) for _ in range(2))
    while found.num_followed < len(text):
        position = found.num_followed
        drafts = [token if rng.random() < 0.8 else rng.randrange(VOCAB_SIZE) for token in text[position : position + 5]]
        masks = found.masks(drafts, ())
        assert len(masks) == 1 + len(drafts)
        (expected,) = alone.masks((), ())
        assert np.array_equal(masks[0], expected)
        num_right = 0
        for draft, mask, right in zip(drafts, masks, text[position:], strict=False):
            if draft != right:
                break
            assert allows(mask, draft)
            num_right += 1
        num_taken = min(num_right + 1, len(text) - position)
        for offset in range(num_taken):
            assert np.array_equal(alone.masks((), ())[0], masks[offset])
            assert alone.follow(text[position + offset : position + offset + 1])
        assert found.follow(text[position : position + num_taken])


def test_a_follower_made_anew_from_the_tokens_so_far_goes_on_the_same(backends: Backends) -> None:
    text = [*ids_of("hm"), MARK, *ids_of('{"ab": [1, {"a": "b"}]}')]
    for cut in range(len(text) + 1):
        first, second = follower(backends, OBJECT, (MARK,)), follower(backends, OBJECT, (MARK,))
        assert first.follow(text[:cut])
        assert second.follow(text[:cut])
        assert allowed(first) == allowed(second)
        assert second.follow(text[cut:])
        assert allowed(second) == {EOS}


def test_masks_are_packed_low_bits_first() -> None:
    mask = full_mask(70)
    assert mask.tolist() == [-1, -1, 0b111111]
    forbid(mask, [0, 31, 33, 69, 5000])
    assert [token_id for token_id in range(70) if not allows(mask, token_id)] == [0, 31, 33, 69]
    assert mask.view(np.uint32).tolist() == [0x7FFFFFFE, 0xFFFFFFFD, 0b011111]


def test_tokens_of_a_vocabulary_are_read_as_bytes_by_their_ids(tmp_path: Path) -> None:
    spelled = make_vocabulary(tmp_path).read()
    assert spelled.tokens[ids_of("true")[0]] == b"true"
    assert b"".join(spelled.tokens[each] for each in ids_of("Größe \x00\x7f\n")) == "Größe \x00\x7f\n".encode()
    assert spelled.tokens[EOS] == b""
    assert len(spelled.tokens) == VOCAB_SIZE
    assert spelled.special == {EOS: "<|end|>", MARK: "</think>"}


def test_tokens_of_sentencepiece_are_text_or_single_bytes(tmp_path: Path) -> None:
    vocab = [["<s>", 0.0], ["▁Paris", -1.0], ["<0x0A>", -2.0], ["<0xE2>", -3.0], ["é", -4.0]]
    document = {
        "model": {"vocab": vocab},
        "added_tokens": [{"id": 0, "content": "<s>", "special": True}, {"id": 5, "content": "<a b>", "special": False}],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    spelled = Vocabulary(tmp_path / "tokenizer.json", 8, (0,)).read()
    assert spelled.tokens == [b"", b" Paris", b"\n", b"\xe2", "é".encode(), b"<a b>", b"", b""]


class TiresomeMatcher:
    """Implements `Matcher`; after so many tokens it gives up, or takes its time."""

    def __init__(self, num_tokens: int, *, gives_up: bool) -> None:
        self._left = num_tokens
        self._gives_up = gives_up

    def fill(self, mask: Mask) -> None:
        self._check()

    def accept(self, token_id: int) -> bool:
        self._left -= 1
        self._check()
        return True

    def rollback(self, num_tokens: int) -> None:
        self._left += num_tokens

    def _check(self) -> None:
        if self._left > 0:
            return
        if self._gives_up:
            raise GrammarRefused("grammar: too complex", param="grammar")
        until_s = time.thread_time() + 0.02
        while time.thread_time() < until_s:
            pass


@pytest.mark.parametrize(("gives_up", "words"), [(True, "too complex"), (False, "too ambiguous, a token takes 0.")])
def test_a_grammar_that_is_too_hard_to_follow_is_given_up_and_says_why(
    monkeypatch: pytest.MonkeyPatch, gives_up: bool, words: str
) -> None:
    monkeypatch.setattr(follower_module, "TIME_MAX_S", 0.01)
    found = GrammarFollower(
        TiresomeMatcher(3, gives_up=gives_up), starts_after=(), eos_token_ids=[EOS], vocab_size=VOCAB_SIZE
    )
    assert found.follow([1, 2])
    assert len(found.masks([1, 2, 3], ())) == 4
    assert len(found.masks([1], ())) == 2
    assert not found.follow([1])
    assert found.problem is not None
    assert words in str(found.problem)


def test_a_text_that_can_be_read_in_ever_more_ways_is_given_up_in_time(
    backends: Backends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower_module, "TIME_MAX_S", 0.01)
    ambiguous = Grammar(GrammarKind.EBNF, 'root ::= s\ns ::= s s | s s s | "a" | ""')
    found = follower(backends, ambiguous)
    (letter,) = ids_of("a")
    while found.problem is None:
        found.masks((), ())
        found.follow([letter])
        assert found.num_followed < 400
    assert "too ambiguous" in str(found.problem)
