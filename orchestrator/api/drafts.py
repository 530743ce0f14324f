"""What a body says beside its prompt, read and let in; and the sequences that it makes of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from disaggregated.errors import InvalidRequest, PromptTooLong, UnknownModel
from disaggregated.grammar import Grammar
from orchestrator.admission.gate import Visit
from orchestrator.api.fields import Fields, shown
from orchestrator.api.generation_fields import GenerationFields
from orchestrator.api.sampling_fields import read_seed
from orchestrator.api.sessions import sessions_of
from orchestrator.api.structured import grammar_field
from orchestrator.front_door import FrontDoor
from orchestrator.http.exchange import Exchange
from orchestrator.parsers.choose import ReplyPlan
from orchestrator.request_run import TokenRequest
from orchestrator.served_model import ServedModel

SEQUENCES_MAX: Final = 512
"""Of one HTTP request."""
PROMPT_TOLD_MAX: Final = 500_000
"""Logprobs of one prompt, those of the likeliest tokens among them."""
STREAMED_PROMPT_TOLD_MAX: Final = 4_000
"""Of one that is echoed in a stream: a stream's events are made between those of all others."""


class Draft:
    """A body whose shared fields are read, and whose prompt is not."""

    __slots__ = (
        "arrived_s", "body", "door", "form", "is_chat", "model", "request_id", "seed", "sessions", "visit"
    )  # fmt: skip

    def __init__(
        self, door: FrontDoor, exchange: Exchange, body: Fields, *, arrived_s: float, is_chat: bool = True
    ) -> None:
        """
        Raises:
            InvalidRequest: names the field and the limit.
            QuotaExceeded, QueueFull: not now.
        """
        self.door = door
        self.request_id = exchange.request_id
        self.arrived_s = arrived_s
        self.body = body
        self.is_chat = is_chat
        self.model = known_model(door, body)
        self.form = door.forms[is_chat].of(body)
        self.seed = read_seed(body)
        self.visit = _visit(door, exchange, body, self.form.fields.priority)
        self.sessions = sessions_of(door.config, exchange, body)

    @property
    def fields(self) -> GenerationFields:
        return self.form.fields

    def headers(self) -> dict[str, str]:
        """Of its answer."""
        headers = {"x-request-id": self.request_id}
        if self.visit.caller.key is not None:
            headers |= self.visit.headers()
        if self.form.ignored:
            headers["x-disagg-ignored"] = self.form.ignored
        return headers

    async def check_grammar(self, grammar: Grammar | None) -> None:
        """What the client's field or its tools ask for. Raises InvalidRequest when it cannot be compiled."""
        if grammar is not None:
            own = self.fields.sampling.grammar
            is_own = own is not None and own.text == grammar.text
            await self.door.check_grammar(grammar, param=grammar_field(self.body) if is_own else "tools")

    def requests(self, prompts: Sequence[Sequence[int]], param: str, plan: ReplyPlan) -> Sequence[TokenRequest]:
        """As many for each prompt as the client wants to choose from; they differ in their seeds."""
        num_each = self.fields.reply.best_of
        if len(prompts) * num_each > SEQUENCES_MAX:
            raise InvalidRequest(
                f"n is {num_each} for {len(prompts)} prompts, the limit is {SEQUENCES_MAX} replies in all", param="n"
            )
        if len(prompts) == num_each == 1:
            return [self.request(prompts[0], self.request_id, param, plan)]
        return [
            _with_seed(self.request(prompt, f"{self.request_id}.{i * num_each + number}", param, plan), number)
            for i, prompt in enumerate(prompts)
            for number in range(num_each)
        ]

    def request(self, prompt: Sequence[int], request_id: str, param: str, plan: ReplyPlan) -> TokenRequest:
        """One sequence. `param`: what its client calls the prompt."""
        fields, door, sessions = self.form.fields, self.door, self.sessions
        wanted = fields.sampling.max_tokens
        longest = door.num_tokens_max(self.model)
        if fields.truncation is not None:
            prompt = fields.truncation.of(prompt, num_tokens_max=longest, max_tokens=wanted)
        _check_length(prompt, longest, door.config.door.prompt_tokens_max, param)
        if fields.sampling.prompt_logprobs is not None:
            _check_told(prompt, fields, param)
        return TokenRequest(
            request_id=request_id,
            token_ids=prompt,
            sampling=msgspec.structs.replace(
                # A larger `max_tokens` is cut to what there is room for: the sequence then ends with "length".
                fields.sampling,
                max_tokens=min(wanted, longest - len(prompt)),
                seed=self.seed,
                grammar=plan.grammar,
                thinking=plan.thinking,
            ),
            arrived_s=self.arrived_s,
            deadline_s=self.arrived_s + self.visit.timeout_s(door.config.request_timeout_s),
            priority=fields.priority,
            cache_salt=fields.cache_salt,
            ticket=self.visit.ticket(),
            session=sessions.generation,
            context_session=sessions.context,
            may_end_anywhere=plan.may_end_anywhere or bool(fields.stop),
        )


def _check_told(prompt: Sequence[int], fields: GenerationFields, param: str) -> None:
    """What is told of a prompt is bounded: for each of its tokens there are as many entries as were asked for."""
    num_top = fields.sampling.prompt_logprobs or 0
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
    if body.values.get("model") == model.name:
        return model
    name = body.text("model")
    if name is None and is_optional:
        return model
    if not name:
        raise InvalidRequest("model is missing", param="model")
    if not model.is_meant_by(name):
        raise UnknownModel(f"the model {shown(name)} does not exist; {model.name!r} is served here", param="model")
    return model


def _visit(door: FrontDoor, exchange: Exchange, body: Fields, priority: int) -> Visit:
    """Who comes in, before anything is spent on the prompt.

    Raises:
        QuotaExceeded, QueueFull: not now.
        InvalidRequest: this key's requests may not ask for that.
    """
    caller, values = exchange.caller, body.values
    if caller.key is not None:
        model = door.served_model()
        door.gate.check_model(caller, str(values.get("model")), model.name, *model.aliases)
    user = values.get("user") or values.get("safety_identifier")
    visit = door.gate.visit(caller, exchange.headers, user=user, priority=priority)
    door.dispatcher.room.check_room(visit.tenant, priority=priority, now_s=door.clock())
    return visit


def _check_length(prompt: Sequence[int], num_tokens_max: int, limit: int, param: str) -> None:
    num_tokens = len(prompt)
    if limit and num_tokens > limit:
        raise PromptTooLong(f"the prompt has {num_tokens} tokens, the limit here is {limit}", param=param)
    if num_tokens >= num_tokens_max:
        raise PromptTooLong(
            f"the prompt has {num_tokens} tokens, the limit is {num_tokens_max - 1}: "
            f"{num_tokens_max} tokens with at least one generated",
            param=param,
        )
