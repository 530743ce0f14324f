"""From an HTTP body to sequences that can be dispatched: everything is checked here, before any work is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, NamedTuple

from disaggregated.text import ChoiceText
from orchestrator.api.beside import Beside, beside_of
from orchestrator.api.chat import Chat, read_chat_form, read_messages
from orchestrator.api.custom_calls import CustomCallsShape
from orchestrator.api.custom_tools import custom_names
from orchestrator.api.drafts import Draft
from orchestrator.api.generation_fields import GenerationFields
from orchestrator.api.prompts import completion_prompts, prompt_texts, prompts_at_once
from orchestrator.api.shapes import ChatShape, CompletionShape, Shape
from orchestrator.api.tools import refuse_tools
from orchestrator.parsers import ReplyParser
from orchestrator.parsers.choose import ReplyPlan
from orchestrator.request_run import TokenRequest
from orchestrator.served_model import ServedModel

NO_PLAN: Final = ReplyPlan()


class Job(NamedTuple):
    """One HTTP request, checked and tokenized."""

    model: ServedModel
    fields: GenerationFields
    shape: Shape
    requests: Sequence[TokenRequest]
    """The sequences of the first prompt, as many as are generated for each, then those of the next."""
    headers: dict[str, str]
    plan: ReplyPlan
    echoed: Sequence[str] = ()
    """What the replies to each prompt begin with, where the client wants to see it."""

    @property
    def is_single(self) -> bool:
        """There is one reply, and nothing is told beside its text."""
        reply = self.fields.reply
        return len(self.requests) == 1 and reply.is_text_alone and not reply.drops_tokens

    def parser(self) -> ReplyParser | None:
        """For one reply."""
        return None if self.plan.make_parser is None else self.plan.make_parser()

    def text_of(self, request: TokenRequest) -> ChoiceText:
        reply = self.fields.reply
        return ChoiceText(
            self.model.tokenizer,
            request.token_ids,
            self.fields.stop,
            shown=self.plan.shown,
            skip_special_tokens=reply.skip_special_tokens,
            include_stop=reply.include_stop,
        )

    def beside_of(self, request: TokenRequest) -> Beside | None:
        return beside_of(self.fields.reply, self.model.tokenizer, request.token_ids)

    def echoed_to(self, index: int) -> str:
        """What the reply to `requests[index]` begins with."""
        return self.echoed[index // self.fields.reply.best_of] if self.echoed else ""


class PlainJob(NamedTuple):
    """One whole reply and nothing but its text: it needs no shape, no parser and no choice."""

    draft: Draft
    request: TokenRequest


LateJob = Callable[[], Coroutine[Any, Any, Job]]
"""Makes a job that has to wait for something: a thread, or the check of a grammar."""


def prepare(draft: Draft) -> PlainJob | Job | LateJob:
    """The job, where nothing has to be waited for: a short prompt, and no grammar.

    Raises:
        InvalidRequest: names the field and the limit. So does the late job.
    """
    return _prepare_chat(draft) if draft.is_chat else _prepare_completion(draft)


def _prepare_chat(draft: Draft) -> PlainJob | Job | LateJob:
    form = draft.form.chat
    if form is None or not form.reads_quickly(draft.body):
        return lambda: job_of(draft)
    chat = form.with_messages(draft.body.get("messages"), draft.model, draft.door.reply_formats)
    plan = chat.plan
    if plan.grammar is not None:
        return lambda: _checked_chat_job(draft, _chat_shape(draft), chat, "messages")
    if draft.form.is_plain and plan.make_parser is None:
        return PlainJob(draft, draft.request(chat.token_ids, draft.request_id, "messages", plan))
    return _chat_job(draft, _chat_shape(draft), chat, "messages")


async def job_of(draft: Draft) -> Job:
    """As `prepare`, whatever has to be waited for. Raises as it does."""
    return await (chat_job_of(draft, _chat_shape(draft)) if draft.is_chat else _late_completion_job(draft))


async def chat_job_of(draft: Draft, shape: Shape, *, param: str = "messages") -> Job:
    """A chat that may be answered in any shape. `param` is what its client calls the messages.

    Raises:
        InvalidRequest: names the field and the limit.
    """
    form, door = draft.form, draft.door
    if form.chat is None:
        allows_template = door.config.allow_request_chat_template
        grammar = form.fields.sampling.grammar
        form.chat = await read_chat_form(draft.body, grammar=grammar, allows_template=allows_template)
    chat = await read_messages(form.chat, draft.body, draft.model, door.reply_formats)
    return await _checked_chat_job(draft, shape, chat, param)


async def _checked_chat_job(draft: Draft, shape: Shape, chat: Chat, param: str) -> Job:
    await draft.check_grammar(chat.plan.grammar)
    return _chat_job(draft, shape, chat, param)


def _chat_job(draft: Draft, shape: Shape, chat: Chat, param: str) -> Job:
    job = _job(draft, shape, [chat.token_ids], param, chat.plan)
    if told := draft.fields.reply.told_of_prompt(job.requests[0].token_ids, chat.text):
        shape.tell(told)
    return job._replace(echoed=[chat.said]) if draft.fields.reply.echo else job


def _chat_shape(draft: Draft) -> ChatShape:
    of_answer = (f"chatcmpl-{draft.request_id}", draft.model.name, int(time.time()))
    include_usage = draft.fields.include_usage
    tools = draft.body.get("tools")
    if tools and (custom := custom_names(tools)):
        return CustomCallsShape(*of_answer, include_usage=include_usage, custom=custom)
    return ChatShape(*of_answer, include_usage=include_usage, calls_functions=bool(draft.body.get("functions")))


def _prepare_completion(draft: Draft) -> PlainJob | Job | LateJob:
    refuse_tools(draft.body)
    prompts = prompts_at_once(draft.body, draft.model) if draft.fields.sampling.grammar is None else None
    if prompts is None:
        return lambda: job_of(draft)
    if draft.form.is_plain and len(prompts) == 1:
        return PlainJob(draft, draft.request(prompts[0], draft.request_id, "prompt", NO_PLAN))
    return _completion_job(draft, prompts)


async def _late_completion_job(draft: Draft) -> Job:
    refuse_tools(draft.body)
    await draft.check_grammar(draft.fields.sampling.grammar)
    return _completion_job(draft, await completion_prompts(draft.body, draft.model))


def _completion_job(draft: Draft, prompts: Sequence[Sequence[int]]) -> Job:
    shape = CompletionShape(
        f"cmpl-{draft.request_id}", draft.model.name, int(time.time()), include_usage=draft.fields.include_usage
    )
    job = _job(draft, shape, prompts, "prompt", ReplyPlan(grammar=draft.fields.sampling.grammar))
    if not draft.fields.reply.echo:
        return job
    return job._replace(echoed=prompt_texts(draft.body, draft.model, prompts))


def _job(draft: Draft, shape: Shape, prompts: Sequence[Sequence[int]], param: str, plan: ReplyPlan) -> Job:
    return Job(
        model=draft.model,
        fields=draft.fields,
        shape=shape,
        requests=draft.requests(prompts, param, plan),
        headers=draft.headers(),
        plan=plan,
    )
