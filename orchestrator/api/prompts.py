"""What a client calls a prompt, turned into token ids. Long texts are tokenized on a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

from disaggregated.errors import InvalidRequest
from orchestrator.api.fields import Fields, wrong_type
from orchestrator.served_model import ServedModel

INLINE_CHARACTERS_MAX: Final = 2000
"""Up to here tokenizing takes a millisecond at most (SmolLM2's tokenizer: 0.9), and a thread would add half of that."""
INLINE_IDS_MAX: Final = 50_000
"""Up to here checking ids takes as long."""
PROMPTS_MAX: Final = 128


def prompts_at_once(fields: Fields, model: ServedModel) -> list[Sequence[int]] | None:
    """Of `prompt`, which is a string, a list of strings, a list of token ids or a list of such lists. None: there is so
    much of it that it is better read on a thread.

    Raises:
        InvalidRequest: names the part that is empty or of another type.
    """
    prompt = fields.values.get("prompt")
    if type(prompt) is list and prompt and type(prompt[0]) is int and len(prompt) <= INLINE_IDS_MAX:
        fields.flag("add_special_tokens")  # They are as they are; but it has to be a flag.
        return [checked_token_ids(prompt, model.tokenizer.vocab_size, "prompt")]
    many = _read_prompts(fields)
    return _all_ids(many, fields, model) if _is_short(many) else None


async def completion_prompts(fields: Fields, model: ServedModel) -> list[Sequence[int]]:
    """The same, of any length. Raises as `prompts_at_once`."""
    at_once = prompts_at_once(fields, model)
    return await asyncio.to_thread(_all_ids, _read_prompts(fields), fields, model) if at_once is None else at_once


def _is_short(many: list[Any]) -> bool:
    texts = sum(len(one) for one in many if type(one) is str)
    ids = sum(len(one) for one in many if type(one) is list)
    return texts <= INLINE_CHARACTERS_MAX and ids <= INLINE_IDS_MAX


def _read_prompts(fields: Fields) -> list[Any]:
    prompt = fields.get("prompt")
    if prompt is None:
        raise InvalidRequest("prompt is missing", param="prompt")
    many = _as_many(prompt)
    if len(many) > PROMPTS_MAX:
        raise InvalidRequest(f"prompt has {len(many)} prompts, the limit is {PROMPTS_MAX}", param="prompt")
    return many


def _all_ids(many: list[Any], fields: Fields, model: ServedModel) -> list[Sequence[int]]:
    adds = fields.flag("add_special_tokens", default=True)
    is_cut = fields.get("truncate_prompt_tokens") is not None
    longest = model.num_tokens_read_max if is_cut else model.num_tokens_max

    def ids_of(prompt: object, name: str) -> Sequence[int]:
        if isinstance(prompt, str):
            ids = model.tokenizer.encode(prompt, adds, param=name, num_tokens_max=longest)
        elif isinstance(prompt, list):
            ids = checked_token_ids(prompt, model.tokenizer.vocab_size, name)
        else:
            raise wrong_type(name, "a string or an array of token ids", prompt)
        if not ids:
            raise InvalidRequest(f"{name} is empty", param=name)
        return ids

    if len(many) == 1:
        return [ids_of(many[0], "prompt")]
    return [ids_of(one, f"prompt[{index}]") for index, one in enumerate(many)]


def _as_many(prompt: object) -> list[Any]:
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list):
        raise wrong_type("prompt", "a string, an array of strings, of token ids, or of such arrays", prompt)
    if not prompt:
        raise InvalidRequest("prompt is empty", param="prompt")
    return [prompt] if type(prompt[0]) is int else prompt


def prompt_texts(fields: Fields, model: ServedModel, prompts: Sequence[Sequence[int]]) -> list[str]:
    """The prompts as text: what the client wrote, or what its token ids say."""
    written = _as_many(fields.get("prompt"))
    return [
        one if isinstance(one, str) else model.tokenizer.decode(ids) for one, ids in zip(written, prompts, strict=True)
    ]


def checked_token_ids(ids: list[Any], vocab_size: int, name: str) -> list[int]:
    """The same list. Checked as a whole: a prompt may have a hundred thousand of them."""
    if not set(map(type, ids)) <= {int}:
        odd = next(index for index, token_id in enumerate(ids) if type(token_id) is not int)
        raise wrong_type(f"{name}[{odd}]", "a token id (an integer)", ids[odd])
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        odd = next(index for index, token_id in enumerate(ids) if not 0 <= token_id < vocab_size)
        raise InvalidRequest(f"{name}[{odd}] must be between 0 and {vocab_size - 1}, is {ids[odd]}", param=name)
    return ids


async def encode(text: str, model: ServedModel, *, add_special_tokens: bool, param: str) -> list[int]:
    """Of a text that is only counted. Raises InvalidRequest, for one that is not Unicode or by far too long."""

    def encoded() -> list[int]:
        longest = model.num_tokens_read_max
        return model.tokenizer.encode(text, add_special_tokens, param=param, num_tokens_max=longest)

    return encoded() if len(text) <= INLINE_CHARACTERS_MAX else await asyncio.to_thread(encoded)
