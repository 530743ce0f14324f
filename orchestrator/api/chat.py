"""A chat, made ready to be generated: its prompt, and what takes its replies apart."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

from disaggregated.errors import InvalidRequest, ModelUnavailable
from disaggregated.grammar import TEXT_BYTES_MAX, Grammar
from orchestrator.api.custom_tools import custom_names
from orchestrator.api.fields import Fields, wrong_type
from orchestrator.api.messages import assistant_text, checked_messages
from orchestrator.api.prompts import INLINE_CHARACTERS_MAX
from orchestrator.api.sampling_fields import read_thinking_budget
from orchestrator.api.tools import ToolUse, read_tools
from orchestrator.parsers.choose import ReplyPlan, Wanted, plan_reply
from orchestrator.parsers.formats import TEXT_ONLY, ReplyFormats
from orchestrator.served_model import ServedModel

TEMPLATE_CHARACTERS_MAX: Final = 64 << 10
TEMPLATE_TIMEOUT_S: Final = 1.0
"""For the rendering of a template that came with a request."""
_TAIL_CHARACTERS: Final = 64
"""Of a prompt's text, in which reasoning may be opened."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    token_ids: list[int]
    plan: ReplyPlan
    text: str
    """That the template made."""
    said: str
    """By the assistant, where the last message is its own: what `echo` puts before the reply."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChatForm:
    """What a chat's fields say beside its messages."""

    tools: ToolUse | None
    wanted: Wanted
    variables: Mapping[str, Any]
    """The template's."""
    add_generation_prompt: bool
    continues: bool
    """The reply goes on from the last message."""
    adds_special_tokens: bool
    """Besides those that the template writes."""
    template: str | None
    """The client's own."""
    may_be_longer: bool = False
    """Than what the model takes: the prompt is cut, or only counted."""

    @classmethod
    def read(cls, fields: Fields, *, grammar: Grammar | None, allows_template: bool) -> ChatForm:
        """
        Raises:
            InvalidRequest: names the field or the tool that is wrong.
        """
        tools = read_tools(fields, has_grammar=grammar is not None)
        return cls(
            tools=tools,
            wanted=_wanted(fields, tools, grammar),
            variables=_template_variables(fields),
            add_generation_prompt=_adds_generation_prompt(fields),
            continues=fields.flag("continue_final_message"),
            adds_special_tokens=fields.flag("add_special_tokens"),
            template=_read_template(fields, allows_template=allows_template),
            may_be_longer=fields.get("truncate_prompt_tokens") is not None,
        )

    def reads_quickly(self, fields: Fields) -> bool:
        """What is long, or a stranger's, is better read on a thread."""
        if self.template is not None:
            return False
        tools = self.tools.tools if self.tools else ()
        return fields.num_bytes <= INLINE_CHARACTERS_MAX or is_small(
            [fields.get("messages"), tools], INLINE_CHARACTERS_MAX
        )

    def with_messages(self, messages: object, model: ServedModel, formats: ReplyFormats) -> Chat:
        """
        Raises:
            InvalidRequest: names the message that is wrong, or says what the model's template has against it.
        """
        checked = checked_messages(messages)
        if checked[-1].get("prefix") and not self.continues:
            going_on = dataclasses.replace(self, continues=True, add_generation_prompt=False)
            return going_on.with_messages(messages, model, formats)
        ids, text = self._prompt(checked, model)
        said, tail = assistant_text(checked[-1]), text[-_TAIL_CHARACTERS:]
        ends_open = self.add_generation_prompt or self.continues
        plan = plan_reply(self.wanted, formats, tail if ends_open else "", continued=said if self.continues else None)
        if plan.grammar is not None and (num_bytes := len(plan.grammar.text.encode())) > TEXT_BYTES_MAX:
            raise InvalidRequest(
                f"tools: their schemas make a grammar of {num_bytes} bytes, the limit is {TEXT_BYTES_MAX}",
                param="tools",
            )
        return Chat(token_ids=ids, plan=plan, text=text, said=said)

    def _prompt(self, messages: Sequence[Mapping[str, Any]], model: ServedModel) -> tuple[list[int], str]:
        """Its ids and its text."""
        if self.template is None:
            text = model.tokenizer.render_chat(
                messages,
                tools=self.tools.tools if self.tools else (),
                add_generation_prompt=self.add_generation_prompt,
                continue_final_message=self.continues,
                template_kwargs=self.variables,
            )
        else:
            text = self._rendered_by_client(self.template, messages, model)
        ids = model.tokenizer.encode(
            text,
            add_special_tokens=self.adds_special_tokens,
            param="messages",
            num_tokens_max=model.num_tokens_read_max if self.may_be_longer else model.num_tokens_max,
        )
        if not ids:
            raise InvalidRequest("messages: the chat template made an empty prompt of them", param="messages")
        return ids, text

    def _rendered_by_client(self, source: str, messages: Sequence[Mapping[str, Any]], model: ServedModel) -> str:
        try:
            template = model.tokenizer.chat_template_of(source)
        except ModelUnavailable as error:
            raise InvalidRequest(f"chat_template: {error}", param="chat_template") from error
        return template.render(
            messages,
            tools=self.tools.tools if self.tools else (),
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continues,
            template_kwargs=self.variables,
            timeout_s=TEMPLATE_TIMEOUT_S,
        )


async def read_chat_form(fields: Fields, *, grammar: Grammar | None, allows_template: bool) -> ChatForm:
    """Many tools, and grammars of their inputs, are read on a thread. Raises as `ChatForm.read` does."""

    def read() -> ChatForm:
        return ChatForm.read(fields, grammar=grammar, allows_template=allows_template)

    listed = [fields.get(name) for name in ("tools", "functions")]
    is_quick = is_small(listed, INLINE_CHARACTERS_MAX) and not custom_names(listed[0])
    return read() if is_quick else await asyncio.to_thread(read)


async def read_messages(form: ChatForm, fields: Fields, model: ServedModel, formats: ReplyFormats) -> Chat:
    """What is long, or a stranger's, is read on a thread. Raises as `ChatForm.with_messages` does."""
    messages = fields.get("messages")
    if form.reads_quickly(fields):
        return form.with_messages(messages, model, formats)
    return await asyncio.to_thread(form.with_messages, messages, model, formats)


def is_small(value: Any, num_characters: int) -> bool:
    """Whether JSON has no more text than this, found out in a time that is bounded by it."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        num_characters -= 10 + (len(value) if isinstance(value, str | list | dict) else 0)
        if num_characters < 0:
            return False
        if isinstance(value, list):
            waiting.extend(value)
        elif isinstance(value, dict):
            waiting.extend(value.values())
    return True


async def chat_prompt(fields: Fields, model: ServedModel) -> list[int]:
    """The ids alone, of a chat that is not generated.

    Raises:
        InvalidRequest: names the message or the tool that is wrong, or says what the model's template has against it.
    """
    form = await read_chat_form(fields, grammar=None, allows_template=False)
    return (await read_messages(form, fields, model, TEXT_ONLY)).token_ids


def _wanted(fields: Fields, tools: ToolUse | None, grammar: Grammar | None) -> Wanted:
    return Wanted(
        schemas=tools.schemas if tools else None,
        inputs=tools.inputs if tools else {},
        must_call=tools is not None and tools.must_call,
        name=tools.name if tools else "",
        is_strict=tools is not None and tools.is_strict,
        is_parallel=tools is None or tools.is_parallel,
        separates_reasoning=fields.flag("separate_reasoning", default=True),
        shows_reasoning=fields.flag("include_reasoning", default=True),
        thinking_tokens_max=read_thinking_budget(fields),
        grammar=grammar,
    )


def _adds_generation_prompt(fields: Fields) -> bool:
    """A message that is gone on with is the beginning of the reply: no other one is begun."""
    continues = fields.flag("continue_final_message")
    adds = fields.flag("add_generation_prompt", default=not continues)
    if continues and adds:
        raise InvalidRequest(
            "add_generation_prompt must be false (or absent) when continue_final_message is true, is true",
            param="add_generation_prompt",
        )
    return adds


def _template_variables(fields: Fields) -> dict[str, Any]:
    """What clients have to say of reasoning, in the variables' names that templates have for it."""
    variables: dict[str, Any] = {}
    thinks = _wants_thinking(fields)
    if thinks is not None:
        variables |= {"enable_thinking": thinks, "thinking": thinks}
    effort = fields.text("reasoning_effort")
    if effort is not None and effort != "none":
        variables["reasoning_effort"] = effort
    if (documents := fields.get("documents")) is not None:
        variables["documents"] = _checked_documents(documents)
    return variables | dict(fields.mapping("chat_template_kwargs") or {})


def _checked_documents(documents: object) -> list[Any]:
    if not isinstance(documents, list):
        raise wrong_type("documents", "an array of objects", documents)
    for index, document in enumerate(documents):
        if not isinstance(document, dict):
            raise wrong_type(f"documents[{index}]", "an object", document)
    return documents


def _wants_thinking(fields: Fields) -> bool | None:
    """Each family of clients has its own way; None: the model decides."""
    enable, thinking = fields.get("enable_thinking"), fields.get("thinking")
    if not isinstance(enable, bool | None):
        raise wrong_type("enable_thinking", "true or false", enable)
    if not isinstance(thinking, bool | dict | None):
        raise wrong_type("thinking", 'an object such as {"type": "enabled"}', thinking)
    if isinstance(thinking, dict):
        thinking = {"enabled": True, "disabled": False}.get(str(thinking.get("type")))
    if enable is not None or thinking is not None:
        return thinking if enable is None else enable
    return False if fields.get("reasoning_effort") == "none" else None


def _read_template(fields: Fields, *, allows_template: bool) -> str | None:
    template = fields.get("chat_template")
    if template is None:
        return None
    if not allows_template:
        raise InvalidRequest(
            "chat_template: templates of requests are not run here (allow_request_chat_template is false)",
            param="chat_template",
        )
    if not isinstance(template, str):
        raise wrong_type("chat_template", "a string", template)
    if len(template) > TEMPLATE_CHARACTERS_MAX:
        raise InvalidRequest(
            f"chat_template has {len(template)} characters, the limit is {TEMPLATE_CHARACTERS_MAX}",
            param="chat_template",
        )
    return template
