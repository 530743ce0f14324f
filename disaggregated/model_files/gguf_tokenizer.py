"""tokenizer.json and tokenizer_config.json out of a GGUF's vocabulary.

A GGUF names the kind of its tokenizer (`tokenizer.ggml.model`) and, for byte-level ones, how text is cut before merging
(`tokenizer.ggml.pre`). What is not known here is refused: a wrong cut gives wrong ids without any error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from disaggregated.errors import ModelUnavailable
from disaggregated.model_files.gguf_file import GgufFile

_CONTROL: Final = 3
_USER_DEFINED: Final = 4
_ROLES: Final = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
"""GGUF's names for the tokens with a role, and Hugging Face's."""

_WORDS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN: Final = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTE_LEVEL: Final = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def _split_by(regex: str) -> list[dict[str, Any]]:
    return [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
        {**_BYTE_LEVEL, "use_regex": False},
    ]


_CUTS: Final[Mapping[str, list[dict[str, Any]]]] = {
    "default": [_BYTE_LEVEL],
    "gpt-2": [_BYTE_LEVEL],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL],
    "llama-bpe": _split_by(_WORDS + r"\p{N}{1,3}|" + _REST),
    "qwen2": _split_by(_WORDS + r"\p{N}|" + _REST),
    "tekken": _split_by(_TEKKEN),
}
_WHOLE_WORDS_FIRST: Final = {"llama-bpe", "tekken"}
"""A word that is in the vocabulary is one token there, whatever the merges say."""
_WITH_BOS: Final = {"llama-bpe", "tekken"}
"""Byte-level tokenizers that begin each text with BOS unless the file says otherwise."""


def tokenizer_files(gguf: GgufFile) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of tokenizer.json and tokenizer_config.json."""
    kind = gguf.require("tokenizer.ggml.model")
    tokens: list[str] = gguf.require("tokenizer.ggml.tokens")
    if kind == "gpt2":
        parts, with_bos = _byte_level(gguf, tokens)
    elif kind == "llama":
        parts, with_bos = _sentencepiece(gguf, tokens), True
    else:
        raise ModelUnavailable(f"{gguf.path}: tokenizer.ggml.model is {kind!r}; 'gpt2' and 'llama' can be read")
    with_bos = bool(gguf.keys.get("tokenizer.ggml.add_bos_token", with_bos))
    roles = _roles(gguf, tokens)
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(gguf, tokens, roles),
        "post_processor": _begin_with(roles["bos_token"], tokens) if with_bos and "bos_token" in roles else None,
        **parts,
    }
    return tokenizer, _tokenizer_config(gguf, roles, with_bos)


def _byte_level(gguf: GgufFile, tokens: Sequence[str]) -> tuple[dict[str, Any], bool]:
    cut = gguf.keys.get("tokenizer.ggml.pre", "default")
    if cut not in _CUTS:
        raise ModelUnavailable(
            f"{gguf.path}: tokenizer.ggml.pre is {cut!r}; {', '.join(sorted(_CUTS))} can be read. "
            "Serve the model from its Hugging Face directory instead"
        )
    steps = _CUTS[cut]
    parts = {
        "normalizer": {"type": "NFC"} if cut == "qwen2" else None,
        "pre_tokenizer": steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
        "decoder": _BYTE_LEVEL,
        "model": {
            **_bpe(tokens, [merge.split(" ", 1) for merge in gguf.require("tokenizer.ggml.merges")]),
            "ignore_merges": cut in _WHOLE_WORDS_FIRST,
        },
    }
    return parts, cut in _WITH_BOS


def _sentencepiece(gguf: GgufFile, tokens: Sequence[str]) -> dict[str, Any]:
    """Llama 2's kind: spaces are `▁`, unknown characters become bytes, and merges follow from the tokens' scores."""
    scores: list[float] = gguf.require("tokenizer.ggml.scores")
    with_space = gguf.keys.get("tokenizer.ggml.add_space_prefix", True)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    unknown = gguf.keys.get("tokenizer.ggml.unknown_token_id")
    return {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*([{"type": "Prepend", "prepend": "▁"}] if with_space else []), spaces],
        },
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [*decoders, *([strip] if with_space else [])]},
        "model": {
            **_bpe(tokens, merges_from_scores(tokens, scores)),
            "unk_token": None if unknown is None else tokens[unknown],
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }


def merges_from_scores(tokens: Sequence[str], scores: Sequence[float]) -> list[list[str]]:
    """Every way to make a token out of two others, best score first; equal scores: the shorter left half first."""
    rank = {token: index for index, token in enumerate(tokens)}
    found: list[tuple[float, int, int, str, str]] = []
    for token, score in zip(tokens, scores, strict=True):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in rank and right in rank:
                found.append((-score, rank[left], rank[right], left, right))
    found.sort()
    return [[left, right] for *_, left, right in found]


def _bpe(tokens: Sequence[str], merges: list[list[str]]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {token: index for index, token in enumerate(tokens)},
        "merges": merges,
    }


def _roles(gguf: GgufFile, tokens: Sequence[str]) -> dict[str, str]:
    found = {}
    for ours, theirs in _ROLES.items():
        index = gguf.keys.get(f"tokenizer.ggml.{ours}_token_id")
        if index is not None and index < len(tokens):
            found[f"{theirs}_token"] = tokens[index]
    return found


def _added_tokens(gguf: GgufFile, tokens: Sequence[str], roles: Mapping[str, str]) -> list[dict[str, Any]]:
    """Tokens found in a text before it is cut. Control tokens are `special`: they are left out of decoded text."""
    kinds: list[int] = gguf.require("tokenizer.ggml.token_type")
    special = set(roles.values())
    return [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == _CONTROL or token in special,
        }
        for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (_CONTROL, _USER_DEFINED) or token in special
    ]


def _begin_with(bos: str, tokens: Sequence[str]) -> dict[str, Any]:
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [tokens.index(bos)], "tokens": [bos]}},
    }


def _tokenizer_config(gguf: GgufFile, roles: Mapping[str, str], with_bos: bool) -> dict[str, Any]:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": gguf.keys.get(f"{gguf.architecture}.context_length"),
        "clean_up_tokenization_spaces": False,
        "add_bos_token": with_bos,
        **roles,
    }
    if template := gguf.keys.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return config
