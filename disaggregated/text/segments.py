"""Ids of a rendered chat, without encoding again what has been encoded before.

A chat's text is cut by the added tokens that its template writes. Where nothing of a tokenizer's work reaches over
such a cut, the ids of the whole are those of the segments in a row; and most segments come again: the system prompt,
with every next turn all turns before it. What is encoded then is what is new.
"""

from __future__ import annotations

import itertools
import json
import re
from array import array
from collections.abc import Callable
from typing import Any, Final

import tokenizers

from disaggregated.bounded_cache import BoundedCache

SEGMENT_CHARACTERS_MAX: Final = 1 << 14
"""A longer one is not kept: it would push out many that come again."""
KEPT_CHARACTERS_MAX: Final = 1 << 20
"""Of all segments together. With four bytes an id, they take about three times as many bytes."""

Encode = Callable[[str], list[int]]


class SegmentedEncoder:
    """Encodes text by its segments. Equal to encoding it whole, which `make` has to find out from the tokenizer."""

    def __init__(self, added_ids: dict[str, int], encode: Encode) -> None:
        self._added_ids = {text: [token_id] for text, token_id in added_ids.items()}
        longest_first = sorted(added_ids, key=len, reverse=True)
        self._cut = re.compile(f"({'|'.join(map(re.escape, longest_first))})").split
        self._encode = encode
        self._kept: BoundedCache[str, array[int]] = BoundedCache(KEPT_CHARACTERS_MAX, entry_max=SEGMENT_CHARACTERS_MAX)

    @classmethod
    def make(cls, backend: tokenizers.Tokenizer, encode: Encode) -> SegmentedEncoder | None:
        """None where a segment's ids may depend on what is beside it. `encode` adds no special tokens."""
        added = backend.get_added_tokens_decoder()
        added_ids = {token.content: token_id for token_id, token in added.items()}
        if not added_ids or not all(map(_is_a_plain_cut, added.values())):
            return None
        if not _keeps_places(backend.normalizer) or not _begins_anywhere(backend.pre_tokenizer):
            return None
        return cls(added_ids, encode)

    def encode(self, text: str) -> list[int]:
        added, kept = self._added_ids, self._kept
        parts = [added.get(part) or kept.get(part) or self._encoded(part) for part in self._cut(text) if part]
        return list(itertools.chain.from_iterable(parts))

    def _encoded(self, segment: str) -> list[int]:
        ids = self._encode(segment)
        self._kept.keep(segment, array("I", ids), size=len(segment))
        return ids


def _is_a_plain_cut(token: tokenizers.AddedToken) -> bool:
    """It is found wherever it stands, before all else is done with the text, and takes nothing of its neighbours."""
    return not (token.lstrip or token.rstrip or token.single_word or token.normalized)


def _keeps_places(normalizer: Any) -> bool:
    """It puts nothing before a text."""
    return all(step["type"] in _UNICODE_FORMS for step in _steps(normalizer, "normalizers"))


def _begins_anywhere(pre_tokenizer: Any) -> bool:
    """The beginning of a segment is treated as any other place: no space is put before it."""
    steps = _steps(pre_tokenizer, "pretokenizers")
    return bool(steps) and all(step["type"] in _PLAIN_CUTS and not step.get("add_prefix_space") for step in steps)


def _steps(stage: Any, of_sequence: str) -> list[dict[str, Any]]:
    if stage is None:
        return []
    described = json.loads(stage.__getstate__())
    steps: list[dict[str, Any]] = described[of_sequence] if described["type"] == "Sequence" else [described]
    return steps


_UNICODE_FORMS: Final = frozenset({"NFC", "NFD", "NFKC", "NFKD"})
_PLAIN_CUTS: Final = frozenset({"ByteLevel", "Digits", "Split", "Punctuation"})
