"""One stream for all requests of a server: who gets what, and that a cancellation never overtakes its admission."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from disaggregated.errors import DisaggregatedError, PoolExhausted, ServerLost
from disaggregated.v1 import control_pb2
from orchestrator.generation_link import ADMIT_TIMEOUT_S, GenerationLink
from orchestrator.server_client import Admitted, TakeBatch
from tests.support.fake_cluster import FakeClient, FakeCluster
from tests.support.virtual_time import run_in_virtual_time


class ScriptedClient(FakeClient):
    """Sends what a test puts into `batches`, answers admissions when told to, and writes down what it is asked."""

    def __init__(self) -> None:
        super().__init__(FakeCluster(0, num_context=0, num_generation=1).of("generation")[0])
        self.batches: asyncio.Queue[control_pb2.StepBatch | Exception] = asyncio.Queue()
        self.answers: list[Callable[[control_pb2.AdmitReply | DisaggregatedError], None]] = []
        """Of admissions that wait."""
        self.asked: list[str] = []

    async def generate(self, orchestrator_id: str, opened: Callable[[], None], take: TakeBatch) -> None:
        opened()
        while not isinstance(batch := await self.batches.get(), Exception):
            take(batch)
        raise batch

    def begin_admit(self, request: control_pb2.AdmitRequest, admitted: Admitted) -> None:
        self.asked.append(f"admit {request.stream_key}")
        self.answers.append(functools.partial(admitted, request.stream_key))

    async def cancel(self, orchestrator_id: str, stream_keys: Sequence[int], *, timeout_s: float) -> None:
        self.asked.append(f"cancel {' '.join(map(str, stream_keys))}")


class Receiver:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.errors: list[str] = []

    def on_delta(self, delta: control_pb2.StreamDelta, now_s: float) -> None:
        self.tokens += delta.token_ids

    def on_token(self, position: int, token_id: int, now_s: float) -> None:
        self.tokens.append(token_id)

    def on_refused(self, error: DisaggregatedError) -> None:
        self.errors.append(f"refused: {error}")

    def on_lost(self, error: ServerLost) -> None:
        self.errors.append(str(error))


def batch(**tokens: int) -> control_pb2.StepBatch:
    deltas = [control_pb2.StreamDelta(stream_key=int(key[1:]), token_ids=[token]) for key, token in tokens.items()]
    return control_pb2.StepBatch(deltas=deltas)


def with_link(
    play: Callable[[ScriptedClient, GenerationLink], Coroutine[Any, Any, None]],
    connect: Callable[[], ScriptedClient] = ScriptedClient,
) -> None:
    async def work() -> None:
        client = connect()
        link = GenerationLink(client, "link-1", clock=asyncio.get_running_loop().time)
        opened = asyncio.Event()
        reader = asyncio.create_task(link.run(opened.set))
        await opened.wait()
        await play(client, link)
        reader.cancel()
        await asyncio.wait([reader])
        if not reader.cancelled():
            reader.exception()

    run_in_virtual_time(work())


async def settle() -> None:
    await asyncio.sleep(0.01)


def test_each_delta_goes_to_whom_it_belongs_and_a_strangers_to_nobody() -> None:
    async def play(client: ScriptedClient, link: GenerationLink) -> None:
        one, two = Receiver(), Receiver()
        first, second = link.open(one), link.open(two)
        client.batches.put_nowait(batch(**{f"k{first}": 10, f"k{second}": 20, "k999999": 30}))
        client.batches.put_nowait(batch(**{f"k{first}": 11}))
        await settle()
        assert (one.tokens, two.tokens) == ([10, 11], [20])
        link.close(first, is_over=True)
        client.batches.put_nowait(batch(**{f"k{first}": 12}))
        await settle()
        assert one.tokens == [10, 11]
        assert client.asked == []

    with_link(play)


@pytest.mark.parametrize("end", [ServerLost("the connection broke"), ValueError("cut")])
def test_when_the_link_breaks_everybody_on_it_is_told_and_nobody_gets_on(end: Exception) -> None:
    async def play(client: ScriptedClient, link: GenerationLink) -> None:
        receivers = [Receiver() for _ in range(3)]
        for receiver in receivers:
            link.open(receiver)
        client.batches.put_nowait(end)
        await settle()
        assert all(len(receiver.errors) == 1 for receiver in receivers)
        assert link.is_broken
        with pytest.raises(ServerLost):
            link.open(Receiver())

    with_link(play)


def test_tokens_in_columns_go_to_whom_they_belong() -> None:
    async def play(client: ScriptedClient, link: GenerationLink) -> None:
        one, two = Receiver(), Receiver()
        first, second = link.open(one), link.open(two)
        client.batches.put_nowait(
            control_pb2.StepBatch(stream_keys=[first, second, 999999], positions=[4, 4, 4], token_ids=[10, 20, 30])
        )
        await settle()
        assert (one.tokens, two.tokens) == ([10], [20])

    with_link(play)


def test_an_abandoned_request_is_cancelled_at_once_when_it_was_admitted() -> None:
    async def play(client: ScriptedClient, link: GenerationLink) -> None:
        key = link.open(Receiver())
        link.admit(control_pb2.AdmitRequest(stream_key=key))
        client.answers[0](control_pb2.AdmitReply())
        link.close(key, is_over=False)
        await settle()
        assert client.asked == [f"admit {key}", f"cancel {key}"]

    with_link(play)


def test_a_cancellation_waits_for_the_answer_to_its_admission() -> None:
    async def play(client: ScriptedClient, link: GenerationLink) -> None:
        key = link.open(Receiver())
        link.admit(control_pb2.AdmitRequest(stream_key=key))
        link.close(key, is_over=False)
        await settle()
        assert client.asked == [f"admit {key}"]
        client.answers[0](control_pb2.AdmitReply())
        await settle()
        assert client.asked == [f"admit {key}", f"cancel {key}"]

    with_link(play)


def test_a_refused_admission_needs_no_cancellation() -> None:
    async def play(client: ScriptedClient, link: GenerationLink) -> None:
        key = link.open(Receiver())
        link.admit(control_pb2.AdmitRequest(stream_key=key))
        link.close(key, is_over=False)
        client.answers[0](PoolExhausted.of(wanted=2, free=1))
        await settle()
        assert client.asked == [f"admit {key}"]

    with_link(play)


def test_an_admission_that_is_not_answered_is_lost_and_its_late_answer_is_nobodys() -> None:
    async def play(client: ScriptedClient, link: GenerationLink) -> None:
        receiver = Receiver()
        key = link.open(receiver)
        link.admit(control_pb2.AdmitRequest(stream_key=key))
        await asyncio.sleep(ADMIT_TIMEOUT_S + 1.0)
        assert receiver.errors == [f"refused: it did not answer an admission in {ADMIT_TIMEOUT_S:g} s"]
        client.answers[0](PoolExhausted.of(wanted=2, free=1))
        assert len(receiver.errors) == 1
        link.close(key, is_over=False)
        await settle()
        assert client.asked == [f"admit {key}", f"cancel {key}"]

    with_link(play)


def test_cancellations_that_pile_up_go_in_one_call() -> None:
    async def play(client: ScriptedClient, link: GenerationLink) -> None:
        keys = [link.open(Receiver()) for _ in range(3)]
        for key in keys:
            link.close(key, is_over=False)
        await settle()
        assert client.asked == [f"cancel {' '.join(map(str, keys))}"]

    with_link(play)


def test_whoever_is_on_a_link_that_ends_learns_once_that_it_is_lost() -> None:
    async def play(client: ScriptedClient, link: GenerationLink) -> None:
        early, late = Receiver(), Receiver()
        link.admit(control_pb2.AdmitRequest(stream_key=link.open(early)))
        key = link.open(late)
        client.batches.put_nowait(ServerLost("the connection broke"))
        await settle()
        client.answers[0](ServerLost("the connection broke"))
        assert early.errors == late.errors == ["the connection broke"]
        with pytest.raises(ServerLost):
            link.admit(control_pb2.AdmitRequest(stream_key=key))

    with_link(play)
