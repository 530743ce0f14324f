"""From an HTTP body to sequences that can be dispatched: everything is checked here, before any work is done."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final

import msgspec

from disaggregated.errors import InvalidRequest, PromptTooLong, UnknownModel
from disaggregated.grammar import Grammar
from disaggregated.text import ChoiceText
from orchestrator.admission.gate import Visit
from orchestrator.api.beside import Beside, beside_of
from orchestrator.api.chat import Chat, read_chat_form, read_messages
from orchestrator.api.custom_calls import CustomCallsShape, custom_names
from orchestrator.api.fields import Fields
from orchestrator.api.forms import Form
from orchestrator.api.generation_fields import GenerationFields
from orchestrator.api.prompts import completion_prompts, prompt_texts, prompts_at_once
from orchestrator.api.sampling_fields import read_seed
from orchestrator.api.sessions import Sessions, sessions_of
from orchestrator.api.shapes import ChatShape, CompletionShape, Shape
from orchestrator.api.structured import grammar_field
from orchestrator.api.tools import refuse_tools
from orchestrator.front_door import FrontDoor
from orchestrator.http.exchange import Exchange
from orchestrator.parsers import ReplyParser
from orchestrator.parsers.choose import ReplyPlan
from orchestrator.request_run import TokenRequest
from orchestrator.served_model import ServedModel

SEQUENCES_MAX: Final = 512
"""Of one HTTP request."""
PROMPT_TOLD_MAX: Final = 500_000
"""Logprobs of one prompt, those of the likeliest tokens among them."""
STREAMED_PROMPT_TOLD_MAX: Final = 4_000
"""Of one that is echoed in a stream: a stream's events are made between those of all others."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
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


LateJob = Callable[[], Coroutine[Any, Any, Job]]
"""Makes a job that has to wait for something: a thread, or the check of a grammar."""


def prepare(draft: Draft) -> Job | LateJob:
    """The job, where nothing has to be waited for: a short prompt, and no grammar.

    Raises:
        InvalidRequest: names the field and the limit. So does the late job.
    """
    return _prepare_chat(draft) if draft.is_chat else _prepare_completion(draft)


def _prepare_chat(draft: Draft) -> Job | LateJob:
    form = draft.form.chat
    if form is None or not form.reads_quickly(draft.body):
        return lambda: job_of(draft)
    chat = form.with_messages(draft.body.get("messages"), draft.model, draft.door.reply_formats)
    if chat.plan.grammar is not None:
        return lambda: _checked_chat_job(draft, _chat_shape(draft), chat, "messages")
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
    job = draft.job(shape, [chat.token_ids], param, chat.plan)
    if told := draft.fields.reply.told_of_prompt(job.requests[0].token_ids, chat.text):
        shape.tell(told)
    return dataclasses.replace(job, echoed=[chat.said]) if draft.fields.reply.echo else job


def _chat_shape(draft: Draft) -> ChatShape:
    of_answer = (f"chatcmpl-{draft.request_id}", draft.model.name, int(time.time()))
    include_usage = draft.fields.include_usage
    if custom := custom_names(draft.body.get("tools")):
        return CustomCallsShape(*of_answer, include_usage=include_usage, custom=custom)
    return ChatShape(*of_answer, include_usage=include_usage, calls_functions=bool(draft.body.get("functions")))


def _prepare_completion(draft: Draft) -> Job | LateJob:
    refuse_tools(draft.body)
    prompts = prompts_at_once(draft.body, draft.model) if draft.fields.sampling.grammar is None else None
    return (lambda: job_of(draft)) if prompts is None else _completion_job(draft, prompts)


async def _late_completion_job(draft: Draft) -> Job:
    refuse_tools(draft.body)
    await draft.check_grammar(draft.fields.sampling.grammar)
    return _completion_job(draft, await completion_prompts(draft.body, draft.model))


def _completion_job(draft: Draft, prompts: Sequence[Sequence[int]]) -> Job:
    shape = CompletionShape(
        f"cmpl-{draft.request_id}", draft.model.name, int(time.time()), include_usage=draft.fields.include_usage
    )
    job = draft.job(shape, prompts, "prompt", ReplyPlan(grammar=draft.fields.sampling.grammar))
    if not draft.fields.reply.echo:
        return job
    return dataclasses.replace(job, echoed=prompt_texts(draft.body, draft.model, prompts))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A body whose shared fields are read, and whose prompt is not."""

    door: FrontDoor
    request_id: str
    arrived_s: float
    body: Fields
    model: ServedModel
    form: Form
    seed: int
    visit: Visit
    sessions: Sessions
    is_chat: bool

    @classmethod
    def of(cls, door: FrontDoor, exchange: Exchange, body: Fields, *, arrived_s: float, is_chat: bool = True) -> Draft:
        """
        Raises:
            InvalidRequest: names the field and the limit.
            QuotaExceeded, QueueFull: not now.
        """
        model = known_model(door, body)
        form = door.forms[is_chat].of(body)
        return cls(
            door=door,
            request_id=exchange.request_id,
            arrived_s=arrived_s,
            body=body,
            model=model,
            form=form,
            seed=read_seed(body),
            visit=_visit(door, exchange, body, form.fields.priority),
            sessions=sessions_of(door.config, exchange, body),
            is_chat=is_chat,
        )

    @property
    def fields(self) -> GenerationFields:
        return self.form.fields

    async def check_grammar(self, grammar: Grammar | None) -> None:
        """What the client's field or its tools ask for. Raises InvalidRequest when it cannot be compiled."""
        if grammar is not None:
            own = self.fields.sampling.grammar
            is_own = own is not None and own.text == grammar.text
            await self.door.check_grammar(grammar, param=grammar_field(self.body) if is_own else "tools")

    def job(self, shape: Shape, prompts: Sequence[Sequence[int]], param: str, plan: ReplyPlan) -> Job:
        headers = {"x-request-id": self.request_id, **self.visit.headers()}
        if self.fields.unknown:
            headers["x-disagg-ignored"] = ",".join(name for name in self.fields.unknown if name.isidentifier())[:1000]
        return Job(
            model=self.model,
            fields=self.fields,
            shape=shape,
            requests=self._requests(prompts, param, plan),
            headers=headers,
            plan=plan,
        )

    def _requests(self, prompts: Sequence[Sequence[int]], param: str, plan: ReplyPlan) -> Sequence[TokenRequest]:
        """As many for each prompt as the client wants to choose from; they differ in their seeds."""
        num_each = self.fields.reply.best_of
        if len(prompts) * num_each > SEQUENCES_MAX:
            raise InvalidRequest(
                f"n is {num_each} for {len(prompts)} prompts, the limit is {SEQUENCES_MAX} replies in all", param="n"
            )
        if len(prompts) == num_each == 1:
            return [self._request(prompts[0], self.request_id, param, plan)]
        return [
            _with_seed(self._request(prompt, f"{self.request_id}.{i * num_each + number}", param, plan), number)
            for i, prompt in enumerate(prompts)
            for number in range(num_each)
        ]

    def _request(self, prompt: Sequence[int], request_id: str, param: str, plan: ReplyPlan) -> TokenRequest:
        fields = self.fields
        wanted = fields.sampling.max_tokens
        if fields.truncation is not None:
            longest = self.door.num_tokens_max(self.model)
            prompt = fields.truncation.of(prompt, num_tokens_max=longest, max_tokens=wanted)
        _check_length(prompt, self.door.config.door.prompt_tokens_max, param)
        _check_told(prompt, fields, param)
        room = _room(prompt, self.door.num_tokens_max(self.model), param)
        return TokenRequest(
            request_id=request_id,
            token_ids=prompt,
            sampling=fields.sampling.but(max_tokens=min(wanted, room), seed=self.seed, grammar=plan.grammar),
            arrived_s=self.arrived_s,
            deadline_s=self.arrived_s + self.visit.timeout_s(self.door.config.request_timeout_s),
            priority=fields.priority,
            cache_salt=fields.cache_salt,
            ticket=self.visit.ticket(),
            session=self.sessions.generation,
            context_session=self.sessions.context,
            may_end_anywhere=plan.may_end_anywhere or bool(fields.stop),
        )


def _check_told(prompt: Sequence[int], fields: GenerationFields, param: str) -> None:
    """What is told of a prompt is bounded: for each of its tokens there are as many entries as were asked for."""
    num_top = fields.sampling.prompt_logprobs
    if num_top is None:
        return
    limit = STREAMED_PROMPT_TOLD_MAX if fields.stream else PROMPT_TOLD_MAX
    if len(prompt) * (num_top + 1) > limit:
        raise InvalidRequest(
            f"the prompt has {len(prompt)} tokens: with {num_top + 1} logprobs for each, these are more than the limit "
            f"of {limit}" + (" when stream is true" if fields.stream else ""),
            param=param,
        )


def _with_seed(request: TokenRequest, number: int) -> TokenRequest:
    seed = (request.sampling.seed + number) % 2**64
    return msgspec.structs.replace(request, sampling=request.sampling.but(seed=seed))


def known_model(door: FrontDoor, body: Fields, *, is_optional: bool = False) -> ServedModel:
    """The one that `model` means.

    Raises:
        UnknownModel: `model` is neither the full name nor an alias of what is served.
        NoServerAvailable: the model is not known yet.
    """
    model = door.served_model()
    name = body.text("model")
    if name is None and is_optional:
        return model
    if not name:
        raise InvalidRequest("model is missing", param="model")
    if not model.is_meant_by(name):
        raise UnknownModel(f"the model {name!r} does not exist; {model.name!r} is served here", param="model")
    return model


def _visit(door: FrontDoor, exchange: Exchange, body: Fields, priority: int) -> Visit:
    """Who comes in, before anything is spent on the prompt.

    Raises:
        QuotaExceeded, QueueFull: not now.
        InvalidRequest: this key's requests may not ask for that.
    """
    caller, model = exchange.caller, door.served_model()
    door.gate.check_model(caller, str(body.get("model")), model.name, *model.aliases)
    user = body.get("user") or body.get("safety_identifier")
    visit = door.gate.visit(caller, exchange.headers, user=user, priority=priority)
    door.dispatcher.room.check_room(visit.tenant, priority=priority, now_s=door.clock())
    return visit


def _check_length(prompt: Sequence[int], limit: int, param: str) -> None:
    if limit and len(prompt) > limit:
        raise PromptTooLong(f"the prompt has {len(prompt)} tokens, the limit here is {limit}", param=param)


def _room(prompt: Sequence[int], num_tokens_max: int, param: str) -> int:
    """Tokens that may follow. A larger `max_tokens` is cut to it: the sequence then ends with "length"."""
    if len(prompt) >= num_tokens_max:
        raise PromptTooLong(
            f"the prompt has {len(prompt)} tokens, the limit is {num_tokens_max - 1}: "
            f"{num_tokens_max} tokens with at least one generated",
            param=param,
        )
    return num_tokens_max - len(prompt)
