"""A model's tokenizer.json, tokenizer_config.json and chat template."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import tokenizers

from disaggregated.errors import InvalidRequest, ModelUnavailable, PromptTooLong
from disaggregated.model_files import read_eos_token_ids
from disaggregated.model_files.checkpoint import read_json
from disaggregated.text.chat_template import ChatTemplate
from disaggregated.text.detokenizer import (
    ByteLevelCache,
    ByteLevelDetokenizer,
    Detokenizer,
    Piece,
    SentencePieceDetokenizer,
    byte_level_spelling,
    sentencepiece_spelling,
)
from disaggregated.text.long_texts import is_longer_for_certain
from disaggregated.text.segments import SegmentedEncoder

_ROLES: Final = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_SPACES: Final = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
_BYTE_FALLBACK: Final = {"type": "ByteFallback"}
_STRIP: Final = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


class Tokenizer:
    """Text to ids and back, for one model. Shared by all requests; its methods may be called from any thread."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        chat_template: ChatTemplate | None,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        """Raises ModelUnavailable if the tokenizer's decoder is of a kind that cannot be streamed."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._chat_template = chat_template
        self.eos_token_ids = eos_token_ids
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self._added_ids = {token.content: index for index, token in added.items()}
        self._special_ids = frozenset(index for index, token in added.items() if token.special)
        decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder else None
        self._byte_level = decoder is not None and decoder["type"] == "ByteLevel"
        self._steps = [] if self._byte_level else _sentencepiece_steps(decoder)
        self._byte_caches: dict[frozenset[int] | None, ByteLevelCache] = {}
        self._by_segments = SegmentedEncoder.make(backend, functools.partial(self._encoded, add_special_tokens=False))

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """From a directory in Hugging Face layout. Raises ModelUnavailable naming the file that is wrong."""
        file = path / "tokenizer.json"
        if not file.is_file():
            raise ModelUnavailable(
                f"{path} has no tokenizer.json; save one with transformers: "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:
            raise ModelUnavailable(f"{file} is damaged: {error}") from error
        config_file = path / "tokenizer_config.json"
        config = read_json(config_file) if config_file.is_file() else {}
        source = _template_source(path, config)
        template = None if source is None else ChatTemplate(source, _special_tokens(config))
        return cls(backend, chat_template=template, eos_token_ids=read_eos_token_ids(path))

    def encode(
        self, text: str, add_special_tokens: bool = True, *, param: str | None = None, num_tokens_max: int | None = None
    ) -> list[int]:
        """Token ids. A rendered chat already has its special tokens in the text: pass False for it.

        `num_tokens_max` bounds the time and the memory that it takes: who gives it has no use for more, but may still
        get somewhat more.

        Raises:
            InvalidRequest(param): it is not Unicode (half of a surrogate pair, which JSON can spell).
            PromptTooLong(param): it has far more than `num_tokens_max`.
        """
        try:
            if num_tokens_max is not None and is_longer_for_certain(text, num_tokens_max, self._num_tokens):
                raise PromptTooLong(
                    f"the prompt has more than {num_tokens_max} tokens, and that is the limit", param=param
                )
            if add_special_tokens or self._by_segments is None:
                return self._encoded(text, add_special_tokens=add_special_tokens)
            return self._by_segments.encode(text)
        except TypeError as error:  # What the library says of it.
            raise InvalidRequest(
                "the text is not valid Unicode: it has half of a surrogate pair", param=param
            ) from error

    def _encoded(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Of the library's ways this is the one that keeps no offsets: faster by half, and other threads run."""
        return list(self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    def _num_tokens(self, text: str) -> int:
        return len(self._backend.encode_batch_fast([text], add_special_tokens=False)[0])

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence at once."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each token as the vocabulary spells it: "Ġfox" for " fox" where tokens are bytes."""
        return [self._backend.id_to_token(token_id) or "" for token_id in ids]

    def spelled(self, token_id: int) -> bytes:
        """What a token stands for, special ones as they are written; nothing for an id that no token has."""
        piece = self._backend.id_to_token(token_id)
        if piece is None:
            return b""
        return byte_level_spelling(piece) if self._byte_level else sentencepiece_spelling(piece)

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    @property
    def chat_template_source(self) -> str:
        """ "" where there is none."""
        return "" if self._chat_template is None else self._chat_template.source

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for a chat, as `ChatTemplate.render` makes it. Raises as that does."""
        if self._chat_template is None:
            raise InvalidRequest("this model has no chat template; use /v1/completions", param="messages")
        return self._chat_template.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
        )

    def special_ids_of(self, texts: Iterable[str]) -> frozenset[int]:
        """Those of `texts` that are special tokens, which replies are shown without."""
        return frozenset(self._added_ids[text] for text in texts if text in self._added_ids) & self._special_ids

    def added_token_id(self, text: str) -> int | None:
        """Of a text that is one token wherever it stands."""
        return self._added_ids.get(text)

    def chat_template_of(self, source: str) -> ChatTemplate:
        """Another template for this model. Raises ModelUnavailable if `source` is not a template."""
        return ChatTemplate(source, self._chat_template.special_tokens if self._chat_template else {})

    def detokenizer(
        self,
        prompt_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        shown: frozenset[int] = frozenset(),
    ) -> Detokenizer:
        """For one reply to `prompt_ids`; the prompt's own text is not repeated. `shown` are special tokens that are not
        skipped: the same few for all replies."""
        if self._byte_level:
            return ByteLevelDetokenizer(self._cache_of(shown if skip_special_tokens else None), prompt_ids)
        return SentencePieceDetokenizer(
            self._piece_of(skip_special_tokens, shown),
            byte_fallback=_BYTE_FALLBACK in self._steps,
            strip_first_space=_STRIP in self._steps,
            prompt_ids=prompt_ids,
        )

    def learn_texts(self) -> None:
        """What tokens are in JSON, all of them: takes a tenth of a second for a large vocabulary, and no reply waits
        for it later. Tokens that are not skipped are learnt when they are met."""
        if self._byte_level:
            self._cache_of(frozenset()).escape_all(self._backend.get_vocab_size(with_added_tokens=True))

    def _cache_of(self, shown: frozenset[int] | None) -> ByteLevelCache:
        """`shown`: None for all special tokens."""
        cache = self._byte_caches.get(shown)
        if cache is None:
            skips = shown is not None
            cache = self._byte_caches[shown] = ByteLevelCache(self._piece_of(skips, shown or frozenset()))
        return cache

    def _piece_of(self, skips_special_tokens: bool, shown: frozenset[int]) -> Piece:
        if not skips_special_tokens:
            return self._backend.id_to_token
        return functools.partial(self._printed_piece, self._special_ids - shown if shown else self._special_ids)

    def _printed_piece(self, skipped: frozenset[int], token_id: int) -> str | None:
        return None if token_id in skipped else self._backend.id_to_token(token_id)


def _sentencepiece_steps(decoder: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    steps = [] if decoder is None else decoder.get("decoders", [decoder])
    steps = [step for step in steps if step != {"type": "Fuse"}]
    if steps not in ([_SPACES], [_SPACES, _STRIP], [_SPACES, _BYTE_FALLBACK], [_SPACES, _BYTE_FALLBACK, _STRIP]):
        kinds = [step.get("type") for step in steps] or "none"
        raise ModelUnavailable(f"tokenizer.json: decoder {kinds} is not supported; ByteLevel and SentencePiece's are")
    return steps


def _template_source(path: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, where newer files have it, else tokenizer_config.json's: one, or a list of named ones."""
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for role in _ROLES:
        token = config.get(role)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            found[role] = token
    return found
