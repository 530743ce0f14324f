"""`LLM(model).generate(prompts, SamplingParams(...))`: the whole system's tokens from one process.

    with LLM("smollm2-135m-instruct") as llm:
        [output] = llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=8))
        print(output.outputs[0].text)

Requests go through the same engine, scheduler and kernels as on a server, on a thread of their own; so several threads
may generate at once, and their sequences share the engine's steps.
"""

from __future__ import annotations

import asyncio
import mmap
import queue
import weakref
from collections.abc import AsyncGenerator, Generator, Sequence
from types import TracebackType
from typing import Any, Final, Self

from disaggregated import logs
from disaggregated.engine.api import EngineEvent, TokensSampled
from disaggregated.engine.thread import EngineThread
from disaggregated.errors import RequestCancelled, ServerLost
from disaggregated.kv_layout import KVLayout
from disaggregated.llm.batch import Batch
from disaggregated.llm.event_router import Deliver, EventRouter
from disaggregated.llm.options import engine_config
from disaggregated.llm.outputs import RequestOutput
from disaggregated.llm.progress import progress_line
from disaggregated.llm.prompts import Chats, Prompt, PromptReader, Prompts
from disaggregated.llm.request_maker import Params, RequestMaker, Requests
from disaggregated.llm.sampling import SamplingParams
from disaggregated.model_files.sampling_defaults import read_sampling_defaults
from disaggregated.text import Tokenizer

log = logs.get(__name__)

CLOSE_TIMEOUT_S: Final = 30.0
"""The step that is running is finished first, and a chunk takes seconds on a slow machine."""
PATIENCE_S: Final = 10.0
"""Without an event for so long, the engine is looked at."""
STEP_LIMIT_S: Final = 600.0
"""A step that takes longer never ends."""
WINDOW_MIN: Final = 64


class LLM:
    """Owns an engine, its thread and its KV pool until `close()`, or until nobody holds the LLM any more."""

    def __init__(self, model: str, **options: Any) -> None:
        """
        model: bundled name, Hugging Face directory or GGUF file.
        options: the keys of a server section, docs/config.md: `dtype`, `device`, `max_num_tokens`,
            `kv_cache_config={"max_tokens": 8192}`, ...

        Raises:
            ConfigError: an option is unknown, wrong, or cannot be had with this model or machine.
            ModelUnavailable, NotEnoughMemory: in one sentence.
        """
        config = engine_config(model, options)
        from disaggregated.engine.load import load_engine  # Torch takes a second: a wrong option is told before it.

        loaded = load_engine(config, allocate=_populated_memory, progress=lambda step: log.info("loading", step=step))
        self.model = loaded.files.name
        self.tokenizer = Tokenizer.load(loaded.files.path)
        self.num_tokens_max = min(loaded.max_seq_len, loaded.engine.max_seq_len)
        """The longest sequence, prompt and generated tokens together."""
        vocab_size = loaded.config.vocab_size
        self._prompts = PromptReader(self.tokenizer, vocab_size=vocab_size, num_tokens_max=self.num_tokens_max)
        self._maker = RequestMaker(
            self.tokenizer,
            sampling_defaults=read_sampling_defaults(loaded.files.path),
            vocab_size=vocab_size,
            num_tokens_max=self.num_tokens_max,
        )
        self._window = max(WINDOW_MIN, 2 * config.max_batch_size)
        self._router = EventRouter()
        self._engine = EngineThread(loaded.engine, self._router.on_events, self._router.on_crash)
        self._engine.start()
        # It must not hold `self`: an LLM that is forgotten, or lives until the interpreter ends, is closed too.
        self._closing = weakref.finalize(self, _close, self._engine, self._router)

    def generate(
        self, prompts: Prompts, sampling_params: Params = None, *, progress: bool = True, use_tqdm: bool = True
    ) -> list[RequestOutput]:
        """One output for each prompt, in their order.

        prompts: a text, token ids, or a list of either.
        sampling_params: for all prompts, or one for each; None: the model's own, and 16 tokens.
        progress: draw a line while it goes on, if stderr is a terminal; `use_tqdm` is its name elsewhere.

        Raises:
            InvalidRequest, PromptTooLong: ValueErrors that name the prompt or parameter; nothing was computed.
            RequestCancelled: the LLM was closed.
            ServerLost: the engine crashed.
        """
        requests = self._maker.make(self._prompts.read(prompts), sampling_params, default=SamplingParams())
        return self._run(requests, shows_progress=progress and use_tqdm)

    def chat(
        self,
        messages: Chats,
        sampling_params: Params = None,
        *,
        progress: bool = True,
        use_tqdm: bool = True,
        **template: Any,
    ) -> list[RequestOutput]:
        """generate() for one chat, or a list of them; without `sampling_params` a reply may take all the room there is.

        template: as in `Tokenizer.render_chat`: `tools`, `add_generation_prompt`, `continue_final_message`,
            `template_kwargs`.
        """
        prompts = self._prompts.read_chats(messages, **template)
        requests = self._maker.make(prompts, sampling_params, default=SamplingParams(max_tokens=None))
        return self._run(requests, shows_progress=progress and use_tqdm)

    def stream(
        self, prompt: str | Sequence[int], sampling_params: SamplingParams | None = None
    ) -> Generator[RequestOutput, None, None]:
        """One prompt's output each time it has grown, and always all of it; leaving the loop cancels the rest.

        Raises as generate() does, at the first step of the loop.
        """
        requests = self._one(prompt, sampling_params)
        inbox: queue.SimpleQueue[EngineEvent] = queue.SimpleQueue()  # Bounded by the tokens that were asked for.
        with self._batch(requests, inbox.put) as batch:
            while not batch.is_over:
                grown = batch.take(self._next_event(inbox))
                if grown is not None and grown.output.token_ids:
                    yield grown.request_output.copy()

    async def generate_async(
        self, prompt: str | Sequence[int], sampling_params: SamplingParams | None = None
    ) -> AsyncGenerator[RequestOutput, None]:
        """stream() for an event loop, which is never blocked."""
        requests = await asyncio.to_thread(self._one, prompt, sampling_params)
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[EngineEvent] = asyncio.Queue()  # Bounded by the tokens that were asked for.

        def deliver(event: EngineEvent) -> None:
            loop.call_soon_threadsafe(inbox.put_nowait, event)

        with self._batch(requests, deliver) as batch:
            while not batch.is_over:
                grown = batch.take(await self._next_event_async(inbox))
                if grown is not None and grown.output.token_ids:
                    yield grown.request_output.copy()

    def close(self) -> None:
        """End the engine's thread; whoever is generating gets RequestCancelled. Idempotent.

        Raises:
            TimeoutError: the current step has not ended; the thread dies with the process.
        """
        self._closing()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Parts of the above.

    def _run(self, requests: Requests, *, shows_progress: bool) -> list[RequestOutput]:
        inbox: queue.SimpleQueue[EngineEvent] = queue.SimpleQueue()  # Bounded by the tokens that were asked for.
        num_sequences = len(requests.sequences)
        progress = progress_line(num_sequences, is_wanted=shows_progress)
        with progress as advance, self._batch(requests, inbox.put) as batch:
            while not batch.is_over:
                event = self._next_event(inbox)
                grown = batch.take(event)
                if grown is not None and isinstance(event, TokensSampled):
                    advance(int(grown.is_over), len(event.token_ids))
        return requests.outputs

    def _one(self, prompt: str | Sequence[int], sampling_params: SamplingParams | None) -> Requests:
        prompts: list[Prompt] = [self._prompts.read_one(prompt, "prompt")]
        return self._maker.make(prompts, sampling_params, default=SamplingParams())

    def _batch(self, requests: Requests, deliver: Deliver) -> Batch:
        return Batch(requests.sequences, engine=self._engine, router=self._router, deliver=deliver, window=self._window)

    def _next_event(self, inbox: queue.SimpleQueue[EngineEvent]) -> EngineEvent:
        while True:
            try:
                return inbox.get(timeout=PATIENCE_S)
            except queue.Empty:
                self._check_progress()

    async def _next_event_async(self, inbox: asyncio.Queue[EngineEvent]) -> EngineEvent:
        while True:
            try:
                async with asyncio.timeout(PATIENCE_S):
                    return await inbox.get()
            except TimeoutError:
                self._check_progress()

    def _check_progress(self) -> None:
        """A long step and a long queue are no failure; a step that never ends is."""
        if (step_age_s := self._engine.statistics().step_age_s) > STEP_LIMIT_S:
            raise ServerLost(f"the engine has not ended a step for {step_age_s:.0f} s")


def _close(engine: EngineThread, router: EventRouter) -> None:
    router.end(lambda: RequestCancelled("the LLM is closed"))
    engine.stop(CLOSE_TIMEOUT_S)


def _populated_memory(layout: KVLayout) -> memoryview:
    """The KV pool of an engine on CPU: no page of it is touched for the first time while somebody waits."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_POPULATE", 0)
    return memoryview(mmap.mmap(-1, layout.pool_bytes, flags=flags))
