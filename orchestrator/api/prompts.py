"""What a client calls a prompt, turned into token ids. Long texts are tokenized on a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Final

from disaggregated.errors import InvalidRequest
from orchestrator.api.fields import Fields, wrong_type
from orchestrator.served_model import ServedModel

INLINE_CHARACTERS_MAX: Final = 2000
"""Up to here tokenizing takes a millisecond at most (SmolLM2's tokenizer: 0.9), and a thread would add half of that."""
PROMPTS_MAX: Final = 128
ROLES: Final = frozenset({"system", "developer", "user", "assistant", "tool", "function"})


async def completion_prompts(fields: Fields, model: ServedModel) -> list[Sequence[int]]:
    """`prompt` is a string, a list of strings, a list of token ids or a list of such lists.

    Raises:
        InvalidRequest: names the part that is empty or of another type.
    """
    prompt = fields.get("prompt")
    if prompt is None:
        raise InvalidRequest("prompt is missing", param="prompt")
    many = _as_many(prompt)
    if len(many) > PROMPTS_MAX:
        raise InvalidRequest(f"prompt has {len(many)} prompts, the limit is {PROMPTS_MAX}", param="prompt")
    add_special_tokens = fields.flag("add_special_tokens", default=True)
    return [
        await _ids_of(one, model, f"prompt[{index}]" if len(many) > 1 else "prompt", add_special_tokens)
        for index, one in enumerate(many)
    ]


def _as_many(prompt: object) -> list[Any]:
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list):
        raise wrong_type("prompt", "a string, an array of strings, of token ids, or of such arrays", prompt)
    if not prompt:
        raise InvalidRequest("prompt is empty", param="prompt")
    return [prompt] if type(prompt[0]) is int else prompt


async def _ids_of(prompt: object, model: ServedModel, name: str, add_special_tokens: bool) -> Sequence[int]:
    if isinstance(prompt, str):
        ids: Sequence[int] = await encode(prompt, model, add_special_tokens=add_special_tokens, param=name)
    elif isinstance(prompt, list):
        ids = checked_token_ids(prompt, model.tokenizer.vocab_size, name)
    else:
        raise wrong_type(name, "a string or an array of token ids", prompt)
    if not ids:
        raise InvalidRequest(f"{name} is empty", param=name)
    return ids


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
    if len(text) <= INLINE_CHARACTERS_MAX:
        return model.tokenizer.encode(text, add_special_tokens, param=param)
    return await asyncio.to_thread(model.tokenizer.encode, text, add_special_tokens, param=param)


async def chat_prompt(fields: Fields, model: ServedModel) -> list[int]:
    """
    Raises:
        InvalidRequest: names the message that is wrong, or says what the model's template has against it.
    """
    messages = checked_messages(fields.get("messages"))
    text = model.tokenizer.render_chat(
        messages,
        add_generation_prompt=fields.flag("add_generation_prompt", default=True),
        template_kwargs=fields.mapping("chat_template_kwargs"),
    )
    ids = await encode(text, model, add_special_tokens=False, param="messages")
    if not ids:
        raise InvalidRequest("messages: the chat template made an empty prompt of them", param="messages")
    return ids


def checked_messages(messages: object) -> list[Mapping[str, Any]]:
    if messages is None:
        raise InvalidRequest("messages is missing", param="messages")
    if not isinstance(messages, list):
        raise wrong_type("messages", "an array of messages", messages)
    if not messages:
        raise InvalidRequest("messages is empty", param="messages")
    return [_checked_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _checked_message(message: object, name: str) -> Mapping[str, Any]:
    if not isinstance(message, dict):
        raise wrong_type(name, "an object", message)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidRequest(
            f"{name}.role must be one of {', '.join(sorted(ROLES))}; is {role!r}", param=f"{name}.role"
        )
    content = message.get("content")
    if content is None and role != "assistant":
        raise InvalidRequest(f"{name}.content is missing", param=f"{name}.content")
    if content is not None and not isinstance(content, (str, list)):
        raise wrong_type(f"{name}.content", "a string or an array of parts", content)
    # Templates were written before this role existed; to them it is the system's.
    return {**message, "role": "system"} if role == "developer" else message
