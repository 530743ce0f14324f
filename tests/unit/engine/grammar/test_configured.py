"""Which library a server's grammars come from, and what it says when there is none."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from disaggregated.config.server import ServerConfig
from disaggregated.engine.grammar.backends import Backends
from disaggregated.engine.grammar.configured import grammar_compiler
from disaggregated.engine.grammar.llguidance_backend import LLGuidanceGrammar
from disaggregated.errors import ConfigError, ModelUnavailable
from disaggregated.grammar import Grammar, GrammarKind
from disaggregated.model_files import ModelConfig, ModelFiles, resolve
from tests.support.grammar_vocabulary import make_vocabulary

WAIT_S = 60.0
HAS_XGRAMMAR = importlib.util.find_spec("xgrammar") is not None


def config(backend: str) -> ServerConfig:
    return ServerConfig(model="smollm2-135m-instruct", role="generation", guided_decoding_backend=backend)


@pytest.fixture(scope="module")
def bundled() -> tuple[ModelFiles, ModelConfig]:
    files = resolve("smollm2-135m-instruct", weights=False)
    return files, ModelConfig.load(files.path)


def test_the_bundled_model_has_grammars_and_its_own_ends(bundled: tuple[ModelFiles, ModelConfig]) -> None:
    compiler = grammar_compiler(config("llguidance"), *bundled)
    assert compiler is not None
    try:
        assert compiler.eos_token_ids == {2}
        follower = compiler.begin(Grammar(GrammarKind.JSON_OBJECT)).result(WAIT_S)
        (mask,) = follower.masks((), ())
        assert len(mask) == bundled[1].vocab_size // 32
        assert mask.any()
    finally:
        compiler.close()


def test_a_model_without_a_tokenizer_has_none_unless_they_are_asked_for(
    tmp_path: Path, bundled: tuple[ModelFiles, ModelConfig]
) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    files = ModelFiles(name="x", aliases=(), path=tmp_path, weights=False)
    assert grammar_compiler(config("auto"), files, bundled[1]) is None
    with pytest.raises(ModelUnavailable, match=r"has no tokenizer\.json"):
        grammar_compiler(config("llguidance"), files, bundled[1])


def test_a_library_that_is_asked_for_and_missing_is_a_mistake_of_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    vocabulary = make_vocabulary(tmp_path)
    with pytest.raises(ConfigError, match="guided_decoding_backend: no xgrammar here: pip install"):
        Backends("xgrammar", vocabulary)
    compiled = Backends("auto", vocabulary).compile(Grammar(GrammarKind.JSON_OBJECT))
    assert isinstance(compiled, LLGuidanceGrammar)


def test_without_a_name_everything_goes_to_llguidance_which_is_there_when_the_server_is(tmp_path: Path) -> None:
    backends = Backends("auto", make_vocabulary(tmp_path))
    backends.load()
    for grammar in (Grammar(GrammarKind.JSON_OBJECT), Grammar(GrammarKind.EBNF, 'root ::= "a"')):
        assert isinstance(backends.compile(grammar), LLGuidanceGrammar)


@pytest.mark.skipif(not HAS_XGRAMMAR, reason="XGrammar is not installed")
@pytest.mark.parametrize(
    ("grammar", "is_llguidance"),
    [
        (Grammar(GrammarKind.JSON_OBJECT), False),
        (Grammar(GrammarKind.EBNF, 'root ::= "a"'), False),
        (Grammar(GrammarKind.REGEX, "a"), False),
        (Grammar(GrammarKind.CHOICE, '["a"]'), False),
        (Grammar(GrammarKind.LARK, 'start: "a"'), True),
        (Grammar(GrammarKind.JSON_SCHEMA, '{"type": "string", "title": "x"}'), False),
        (Grammar(GrammarKind.JSON_SCHEMA, '{"type": "string", "maxLength": 5}'), True),
        (Grammar(GrammarKind.JSON_SCHEMA, '{"type": "object", "properties": {"maxLength": {}}}'), False),
        (Grammar(GrammarKind.JSON_SCHEMA, '{"items": {"anyOf": [{"multipleOf": 2, "type": "integer"}]}}'), True),
        (Grammar(GrammarKind.JSON_SCHEMA, '{"$ref": "#/$defs/a", "$defs": {"a": {"const": 1}}}'), False),
        (Grammar(GrammarKind.JSON_SCHEMA, '{"$ref": "#/$defs/a", "minimum": 1, "$defs": {"a": {"const": 1}}}'), True),
        (Grammar(GrammarKind.JSON_SCHEMA, '{"anyOf": [{"const": 1}], "type": "integer"}'), True),
        (Grammar(GrammarKind.JSON_SCHEMA, '{"enum": ["' + "x" * 9000 + '"]}'), True),
    ],
)
def test_what_xgrammar_cannot_follow_goes_to_llguidance(tmp_path: Path, grammar: Grammar, is_llguidance: bool) -> None:
    compiled = Backends("xgrammar", make_vocabulary(tmp_path)).compile(grammar)
    assert isinstance(compiled, LLGuidanceGrammar) == is_llguidance
