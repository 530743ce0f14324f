"""Batches over a real engine thread and a model that is a hash function."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator, Sequence

import pytest

from disaggregated.engine.api import EngineEvent, ScheduledSequence, TokensSampled
from disaggregated.engine.engine import LLMEngine
from disaggregated.engine.engine_limits import EngineLimits
from disaggregated.engine.thread import EngineThread
from disaggregated.errors import DisaggregatedError, Draining, PoolExhausted, RequestCancelled, ServerLost
from disaggregated.llm import SamplingParams
from disaggregated.llm.batch import Batch
from disaggregated.llm.event_router import EventRouter
from disaggregated.llm.prompts import Prompt
from disaggregated.llm.request_maker import RequestMaker, Requests
from tests.support.byte_model import byte_tokenizer
from tests.support.fake_runner import FakeModelRunner, oracle

WAIT_S = 10.0
MAX_SEQ_LEN = 64
NUM_BLOCKS, BLOCK_SIZE = 32, 4


class Engine:
    """An engine thread, and its router."""

    def __init__(self, runner: FakeModelRunner, max_seq_len: int) -> None:
        self.runner = runner
        self.router = EventRouter()
        self.inner = LLMEngine(
            runner,
            EngineLimits(
                num_blocks=NUM_BLOCKS,
                block_size=BLOCK_SIZE,
                max_num_tokens=32,
                max_batch_size=8,
                max_seq_len=max_seq_len,
            ),
        )
        self.thread = EngineThread(self.inner, self.router.on_events, self.router.on_crash)
        self.inbox: queue.SimpleQueue[EngineEvent] = queue.SimpleQueue()

    def batch(self, requests: Requests, window: int = 4) -> Batch:
        return Batch(requests.sequences, engine=self.thread, router=self.router, deliver=self.inbox.put, window=window)

    def finish(self, batch: Batch) -> None:
        while not batch.is_over:
            batch.take(self.inbox.get(timeout=WAIT_S))

    def wait_idle(self) -> None:
        """Cancelled sequences are gone, and so is every block."""
        assert self.thread.ledger().result(WAIT_S) == []
        self.thread.check_integrity().result(WAIT_S)


@contextlib.contextmanager
def running(runner: FakeModelRunner | None = None, *, max_seq_len: int = MAX_SEQ_LEN) -> Iterator[Engine]:
    engine = Engine(runner or FakeModelRunner(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE), max_seq_len)
    engine.thread.start()
    yield engine
    engine.thread.stop(WAIT_S)


MAKER = RequestMaker(byte_tokenizer(), sampling_defaults={}, vocab_size=97, num_tokens_max=MAX_SEQ_LEN)


def make(prompts: Sequence[Sequence[int]], params: SamplingParams | list[SamplingParams]) -> Requests:
    read = [Prompt(text=None, token_ids=list(token_ids)) for token_ids in prompts]
    return MAKER.make(read, params, default=SamplingParams())


GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def test_many_prompts_go_through_a_small_window_and_come_out_in_order() -> None:
    prompts = [list(range(first, first + 5)) for first in range(20)]
    requests = make(prompts, GREEDY)
    with running() as engine, engine.batch(requests, window=3) as batch:
        engine.finish(batch)
        assert max(map(len, engine.runner.batches)) == 3
        engine.wait_idle()
    for prompt, sequence, output in zip(prompts, requests.sequences, requests.outputs, strict=True):
        expected, reason = oracle(prompt, sequence.request.sampling, max_seq_len=MAX_SEQ_LEN)
        assert output.prompt_token_ids == prompt
        assert output.outputs[0].token_ids == expected
        assert output.outputs[0].finish_reason == reason
        assert output.finished


def test_each_of_n_sequences_has_its_own_place() -> None:
    requests = make([[1, 2, 3]], SamplingParams(n=4, temperature=1.0, seed=5, max_tokens=8, ignore_eos=True))
    with running() as engine, engine.batch(requests) as batch:
        engine.finish(batch)
    [output] = requests.outputs
    assert [completion.index for completion in output.outputs] == [0, 1, 2, 3]
    assert len({tuple(completion.token_ids) for completion in output.outputs}) == 4


def test_a_stop_string_ends_a_sequence_in_the_engine_too() -> None:
    whole = make([[1, 2, 3]], GREEDY)
    with running() as engine, engine.batch(whole) as batch:
        engine.finish(batch)
    text = whole.outputs[0].outputs[0].text
    stopped = make([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, stop=text[2]))
    with running() as engine, engine.batch(stopped) as batch:
        engine.finish(batch)
        engine.wait_idle()
    [completion] = stopped.outputs[0].outputs
    assert completion.text == text[: text.index(text[2])]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", text[2])


def test_a_stop_token_is_named_and_the_end_of_text_is_not() -> None:
    first = make([[1, 2, 3]], GREEDY)
    with running() as engine, engine.batch(first) as batch:
        engine.finish(batch)
    third = first.outputs[0].outputs[0].token_ids[2]
    requests = make([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=6, stop_token_ids=[third]))
    with running() as engine, engine.batch(requests) as batch:
        engine.finish(batch)
    [completion] = requests.outputs[0].outputs
    assert completion.token_ids[-1] == completion.stop_reason == third
    assert third not in completion.token_ids[:-1]


def test_several_tokens_of_one_step_are_cut_at_the_one_that_completes_the_stop_string() -> None:
    requests = make([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=9, stop="C"))
    [sequence] = requests.sequences
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("ABCDE")
    sequence.take(TokensSampled(request_id=sequence.request.request_id, first_position=3, token_ids=tuple(ids)))
    assert sequence.is_over
    assert sequence.output.text == "AB"
    assert sequence.output.token_ids == ids[:3]


def test_leaving_a_batch_early_leaves_nothing_in_the_engine() -> None:
    requests = make([[first, first + 1] for first in range(12)], GREEDY)
    with running() as engine:
        with engine.batch(requests) as batch:
            batch.take(engine.inbox.get(timeout=WAIT_S))
        assert batch.is_over
        engine.wait_idle()


def test_a_prompt_larger_than_the_pool_fails_the_call_and_frees_its_mates() -> None:
    too_long = [5] * (NUM_BLOCKS * BLOCK_SIZE + 1)
    maker = RequestMaker(byte_tokenizer(), sampling_defaults={}, vocab_size=97, num_tokens_max=1000)
    prompts = [Prompt(text=None, token_ids=ids) for ids in ([1, 2, 3], too_long)]
    requests = maker.make(prompts, GREEDY, default=GREEDY)
    with running(max_seq_len=1000) as engine:
        with pytest.raises(PoolExhausted, match="the whole pool has 32"), engine.batch(requests) as batch:
            engine.finish(batch)
        engine.wait_idle()


class CrashingRunner(FakeModelRunner):
    def execute(self, batch: Sequence[ScheduledSequence]) -> Sequence[Sequence[int]]:
        raise RuntimeError("out of luck")


def test_a_crash_of_the_engine_reaches_whoever_waits_and_whoever_comes() -> None:
    with running(CrashingRunner(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)) as engine:
        with pytest.raises(ServerLost, match="out of luck"), engine.batch(make([[1]], GREEDY)) as batch:
            engine.finish(batch)
        with pytest.raises(ServerLost, match="out of luck"), engine.batch(make([[2]], GREEDY)):
            pass


def test_the_end_of_the_router_reaches_whoever_waits() -> None:
    router = EventRouter()
    received: list[EngineEvent] = []
    router.open("a", received.append)
    router.end(lambda: RequestCancelled("closed"))
    [event] = received
    assert isinstance(getattr(event, "error", None), RequestCancelled)
    with pytest.raises(RequestCancelled, match="closed"):
        router.open("b", received.append)


def test_events_of_a_closed_sequence_go_nowhere() -> None:
    router = EventRouter()
    received: list[EngineEvent] = []
    router.open("a", received.append)
    event = TokensSampled(request_id="a", first_position=3, token_ids=(1,))
    router.on_events([event])
    router.close("a")
    router.close("a")
    router.on_events([event])
    assert received == [event]


def test_a_stopped_engine_takes_no_batch() -> None:
    with running() as engine:
        pass
    with pytest.raises(Draining), engine.batch(make([[1]], GREEDY)):
        pass


def test_batches_of_several_threads_share_the_engine() -> None:
    """Each thread has an inbox of its own, and gets its own sequences' tokens alone."""
    all_requests = [make([[thread, step] for step in range(6)], GREEDY) for thread in range(4)]
    failures: list[DisaggregatedError | queue.Empty] = []

    def work(engine: Engine, requests: Requests) -> None:
        inbox: queue.SimpleQueue[EngineEvent] = queue.SimpleQueue()
        batch = Batch(requests.sequences, engine=engine.thread, router=engine.router, deliver=inbox.put, window=2)
        try:
            with batch:
                while not batch.is_over:
                    batch.take(inbox.get(timeout=WAIT_S))
        except (DisaggregatedError, queue.Empty) as error:
            failures.append(error)

    with running() as engine:
        threads = [threading.Thread(target=work, args=(engine, requests)) for requests in all_requests]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        engine.wait_idle()
    assert not failures
    for requests in all_requests:
        for sequence in requests.sequences:
            expected, _ = oracle(sequence.request.token_ids, sequence.request.sampling, max_seq_len=MAX_SEQ_LEN)
            assert sequence.output.token_ids == expected
