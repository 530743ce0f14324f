"""What every HTTP handler needs, in one place: the model, the servers, the dispatcher, the numbers."""

from __future__ import annotations

import asyncio
import functools
import itertools
import time
from collections.abc import Callable
from typing import Final

from disaggregated import logs
from disaggregated.config.deployment import DeploymentConfig
from disaggregated.errors import ModelUnavailable, NoServerAvailable
from orchestrator.admission.make import make_gate
from orchestrator.admission.quotas import Levels
from orchestrator.api.forms import Forms
from orchestrator.api.outbox import Outbox
from orchestrator.dispatch import Dispatcher
from orchestrator.grammar_check import GrammarCheck
from orchestrator.loop_lag import LoopLag
from orchestrator.metrics import Metrics
from orchestrator.parsers.formats import ReplyFormats
from orchestrator.response_store import ResponseStore
from orchestrator.scaler import Scaler
from orchestrator.served_model import ServedModel
from orchestrator.server import Role
from orchestrator.server_pools import ServerPools
from orchestrator.siblings import Alone, Siblings
from orchestrator.task_owner import TaskOwner

log = logs.get(__name__)

START_GRACE_S: Final = 15.0
"""At start, how long /health waits for the servers that the file names but that have not joined yet, once requests
could be served without them."""

MODEL_RETRY_S_MIN: Final = 0.5
MODEL_RETRY_S_MAX: Final = 30.0
"""Between two tries to load the tokenizer; each waits twice as long as the one before."""

REASONS_MAX: Final = 4
"""That one answer of /health names."""


class FrontDoor:
    def __init__(
        self,
        config: DeploymentConfig,
        pools: ServerPools,
        *,
        model: ServedModel | None,
        scaler: Scaler | None,
        siblings: Siblings | None = None,
        levels: Levels | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.pools = pools
        self.scaler = scaler
        self.siblings = siblings or Alone()
        self.responses = ResponseStore(config.door.responses_bytes_max)
        self.clock = clock
        self.metrics = Metrics(pools)
        self.dispatcher = Dispatcher(config, pools, observer=self.metrics, clock=clock)
        self.metrics.watch(self.dispatcher)
        self.check_grammar = GrammarCheck()
        self.outbox = Outbox()
        self.loop_lag = LoopLag(self.metrics.loop_lagged)
        self._model: ServedModel | None = None
        self._model_problem = ""
        self._servable_since_s: float | None = None
        self._has_started = False
        self._is_stopping = False
        self._owner = TaskOwner(pools.on_crash)
        start = functools.partial(self._owner.start, name="read keys")
        self.gate = make_gate(config.door, clock=clock, start=start, levels=levels)
        if model is not None:
            self._serve_model(model)

    # The model.

    def served_model(self) -> ServedModel:
        """
        Raises:
            NoServerAvailable: it is not known yet which model this is, or its tokenizer cannot be loaded.
        """
        if self._model is None:
            raise NoServerAvailable(self._model_problem or "the model is not loaded yet")
        return self._model

    @property
    def model_names(self) -> tuple[str, ...]:
        """Of the served model, in full first; none while it is not known."""
        return () if self._model is None else (self._model.name, *self._model.aliases)

    def num_tokens_max(self, model: ServedModel) -> int:
        """The longest sequence, prompt and generated tokens together."""
        return min(model.num_tokens_max, self.pools.num_tokens_max or model.num_tokens_max)

    def _serve_model(self, model: ServedModel) -> None:
        self._model = self.pools.model = model
        self.forms = {is_chat: Forms(model, is_chat=is_chat) for is_chat in (True, False)}
        self.reply_formats = ReplyFormats.choose(self.config.tool_parser, self.config.reasoning_parser, model.tokenizer)
        log.info("model_loaded", model=model.name)

    async def _load_model(self) -> None:
        """The configured one, or else the one that the first server tells. What cannot be had now is tried again: a
        download may succeed later, and a file may be put where it was missing."""
        for tries in itertools.count():
            name = self.config.model or await self.pools.first_model()
            try:
                self._serve_model(await asyncio.to_thread(ServedModel.load, name))
                return
            except ModelUnavailable as error:
                problem = f"the tokenizer of {name!r} cannot be loaded here: {error}"
                if problem != self._model_problem:
                    log.error("model_unavailable", model=name, error=str(error))
                self._model_problem = problem
            await asyncio.sleep(min(MODEL_RETRY_S_MIN * 2**tries, MODEL_RETRY_S_MAX))

    # Life.

    def start(self) -> None:
        self.pools.start()
        self.loop_lag.start()
        if self._model is None:
            self._owner.start(self._load_model(), name="load model")

    async def stop(self, *, timeout_s: float) -> None:
        """Before `close`: nothing new is taken, and every request under way comes to its end within `timeout_s`, or to
        an error that its client sees soon after."""
        self._is_stopping = True
        await self.dispatcher.stop(timeout_s=timeout_s)

    async def close(self) -> None:
        self.loop_lag.stop()
        await self._owner.close()
        await self.pools.close()

    # Health.

    def why_not_serving(self) -> str | None:
        """In words, why a request that came now would have to wait or fail; None when it would be served."""
        problem = self._why_not_servable()
        if problem is not None:
            self._servable_since_s = None
            return problem
        if self._has_started:
            return None
        if self._servable_since_s is None:
            self._servable_since_s = self.clock()
        missing = self._missing()
        if missing and self.clock() - self._servable_since_s < START_GRACE_S:
            return f"starting: waiting for {missing}"
        self._has_started = True
        return None

    def _why_not_servable(self) -> str | None:
        if self._is_stopping:
            return "the orchestrator is stopping"
        if self._model is None:
            return self._model_problem or "the model is not loaded yet"
        decoders = self.pools.ready(Role.GENERATION)
        if not decoders:
            return f"no generation server is ready{self._reasons(Role.GENERATION)}"
        if not self.pools.ready(Role.CONTEXT) and not any(server.description.can_prefill for server in decoders):
            return f"no context server is ready{self._reasons(Role.CONTEXT)}"
        return None

    def _missing(self) -> str:
        short = {role: self._num_wanted(role) - len(self.pools.ready(role)) for role in (Role.CONTEXT, Role.GENERATION)}
        words = [f"{count} {role}" for role, count in short.items() if count > 0]
        return f"{' and '.join(words)} servers" if words else ""

    def _num_wanted(self, role: Role) -> int:
        pool = self.config.context if role is Role.CONTEXT else self.config.generation
        if self.scaler is None or pool.urls:
            return pool.num_instances
        leaving = ("draining", "stopping")
        return sum(row["role"] == role.value and row["phase"] not in leaving for row in self.scaler.describe())

    def _reasons(self, role: Role) -> str:
        """Of the servers that do not answer, and of the local processes that are no server yet, or no more."""
        words = [f"{server.address}: {server.reason}" for server in self.pools.of(role) if server.reason]
        for row in self.scaler.describe() if self.scaler else ():
            if row["role"] == role.value and row["phase"] != "ready":
                last_exit = f", the last one ended with {row['last_exit']}" if row["last_exit"] else ""
                words.append(f"{row['name']} is {row['phase']}{last_exit}")
        return "".join(f"; {reason}" for reason in words[:REASONS_MAX])
