"""Multi-turn chats over real servers: only what is new travels, either way, and the tokens are those of one process."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from context_server.pull_cost import MARGIN, REST_S
from disaggregated.sampling_params import SamplingParams
from disaggregated.v1 import control_pb2
from tests.support.server_client import ContextClient, GenerationClient, complete_disaggregated
from tests.support.servers import Pair, generation_server, random_prompt, server_pair, write_model

pytestmark = pytest.mark.asyncio(loop_scope="module")

SAMPLED = SamplingParams(max_tokens=40, temperature=1.0, top_p=0.95, seed=7)
FIRST = SAMPLED.but(max_tokens=1)
BLOCK = 16
LONG = 800
"""Tokens that take the slow model a good part of a second to compute, and a pull a few milliseconds."""
LITTLE_S = 15.0
"""What a hint that leads nowhere may cost where other processes are computing."""
PATIENT = "--cache-transceiver-config.pull-back-patience-ms=60000"
"""Other processes may be computing on these cores, too."""


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def pair(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pair]:
    """Of the slow model, after the context server has measured what computing costs it."""
    async with server_pair(write_model(tmp_path_factory.mktemp("model"), slow=True), PATIENT) as made:
        await made.context.first_token(random_prompt(LONG, seed=99), FIRST)
        yield made
        await made.wait_idle()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def oracle(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[GenerationClient]:
    """One process that does everything, with nothing cached."""
    model = write_model(tmp_path_factory.mktemp("oracle"), slow=True)
    async with generation_server(model, "--kv-cache-config.enable-block-reuse=false") as (_, client):
        yield client


def block_bytes(generation: GenerationClient) -> int:
    layout = generation.description.layout
    return 2 * 4 * layout.num_layers * layout.num_kv_heads * layout.head_dim * layout.block_size


# Forward: from the context server to where it decodes.


async def test_a_chat_sends_only_the_blocks_of_its_new_turn(pair: Pair, oracle: GenerationClient) -> None:
    """The answers' blocks are where they were decoded. The last token of an answer was never computed, so that the
    block it would have filled is not there; nor is a partial one."""
    chat = random_prompt(100)
    num_held = 0
    for turn in range(4):
        completion = await complete_disaggregated(pair.context, pair.generation, chat, SAMPLED)
        assert completion.token_ids == (await oracle.complete(chat, SAMPLED)).token_ids
        assert completion.times is not None
        num_blocks = -(-len(chat) // BLOCK)
        assert completion.times.transfer_bytes == (num_blocks - num_held) * block_bytes(pair.generation)
        assert completion.times.saved_bytes == num_held * block_bytes(pair.generation)
        assert completion.times.num_cached_tokens == num_held * BLOCK
        chat = [*chat, *completion.token_ids]
        num_held = (len(chat) - 1) // BLOCK
        chat += random_prompt(25 + turn, seed=turn)


async def test_blocks_in_the_host_tier_need_not_travel_and_those_that_are_gone_do(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    model = write_model(tmp_path_factory.mktemp("brisk"))
    small, host = "--kv-cache-config.max-tokens=512", "--kv-cache-config.host-cache-size=4000000"
    async with (
        server_pair(model, generation_flags=(small, host)) as servers,
        generation_server(model, small) as (_, without),
    ):
        for generation, expected in ((servers.generation, 18), (without, 0)):
            chat = random_prompt(250)
            first = await complete_disaggregated(servers.context, generation, chat, SAMPLED)
            for seed in range(3):  # As much as fills the pool, of others.
                await complete_disaggregated(servers.context, generation, random_prompt(400, seed), SAMPLED)
            chat = [*chat, *first.token_ids, *random_prompt(20)]
            again = await complete_disaggregated(servers.context, generation, chat, SAMPLED)
            assert again.times is not None
            assert again.times.num_cached_tokens == expected * BLOCK
            num_blocks = -(-len(chat) // BLOCK)
            assert again.times.transfer_bytes == (num_blocks - expected) * block_bytes(generation)
        await servers.wait_idle()
        await without.wait_idle()


# Back: from where it was decoded to the context server.


async def test_what_was_decoded_comes_back_and_only_the_new_turn_is_computed(
    pair: Pair, oracle: GenerationClient
) -> None:
    """The context server has never seen this chat."""
    chat = random_prompt(LONG, seed=1)
    answer = await pair.generation.complete(chat, SAMPLED)
    chat = [*chat, *answer.token_ids, *random_prompt(30, seed=2)]
    num_there = (LONG + len(answer.token_ids) - 1) // BLOCK * BLOCK
    expected = await oracle.complete(chat, SAMPLED)
    messages = [
        message async for message in pair.context.prefill(chat, SAMPLED, reuse_from=pair.generation.hint(num_there))
    ]
    outcome = messages[-1].outcome
    assert outcome.first_token == expected.token_ids[0]
    assert outcome.reuse.verdict == "pulled"
    assert outcome.reuse.num_tokens == outcome.reuse.num_considered_tokens == num_there
    assert outcome.reuse.num_bytes == num_there // BLOCK * block_bytes(pair.generation)
    assert 0 < outcome.reuse.pull_estimate_s < outcome.reuse.compute_estimate_s
    assert messages[-1].num_cached_tokens == num_there
    completion = await complete_disaggregated(pair.context, pair.generation, chat, SAMPLED)
    assert completion.token_ids == expected.token_ids
    await pair.wait_idle()


async def test_a_hint_for_what_is_here_already_is_not_followed(pair: Pair) -> None:
    chat = random_prompt(LONG, seed=3)
    await pair.context.first_token(chat, SAMPLED)
    outcome = await pair.context.first_token(chat, SAMPLED, reuse_from=pair.generation.hint(LONG))
    assert outcome.reuse.verdict == "already_here"
    assert outcome.reuse.num_tokens == 0


async def test_a_short_beginning_is_computed(pair: Pair) -> None:
    """Where others compute, it may take so long that a pull is worth it: the server says so itself."""
    chat = random_prompt(40, seed=4)
    await pair.generation.complete(chat, SAMPLED)
    outcome = await pair.context.first_token(chat, SAMPLED, reuse_from=pair.generation.hint(16))
    if outcome.reuse.verdict != "computing_is_cheaper":
        assert outcome.reuse.compute_estimate_s >= MARGIN * outcome.reuse.pull_estimate_s
        await asyncio.sleep(REST_S)  # A peer whose blocks came too late is not asked for a while.
    assert outcome.reuse.num_considered_tokens == 16


async def test_a_server_without_the_blocks_costs_one_question(pair: Pair, oracle: GenerationClient) -> None:
    chat = random_prompt(LONG, seed=5)
    outcome = await pair.context.first_token(chat, SAMPLED, reuse_from=pair.generation.hint(LONG))
    assert outcome.reuse.verdict == "not_there"
    assert outcome.first_token == (await oracle.complete(chat, SAMPLED)).token_ids[0]


async def test_a_part_of_what_was_hinted_at_is_taken(pair: Pair, oracle: GenerationClient) -> None:
    stem = random_prompt(LONG, seed=6)
    await pair.generation.complete(stem, SAMPLED)
    chat = [*stem, *random_prompt(200, seed=7)]
    outcome = await pair.context.first_token(chat, SAMPLED, reuse_from=pair.generation.hint(len(chat)))
    assert (outcome.reuse.verdict, outcome.reuse.num_tokens) == ("pulled", LONG)
    assert outcome.first_token == (await oracle.complete(chat, SAMPLED)).token_ids[0]


async def test_blocks_of_a_sequence_that_still_runs_are_lent(pair: Pair, oracle: GenerationClient) -> None:
    chat = random_prompt(LONG, seed=8)
    endless = SamplingParams(max_tokens=2000, temperature=1.0, seed=3)
    key = await pair.generation.admit(chat, endless)
    await pair.generation.delta(key)
    outcome = await pair.context.first_token(chat, SAMPLED, reuse_from=pair.generation.hint(LONG))
    assert await pair.generation.cancel(key) == 1
    assert (outcome.reuse.verdict, outcome.reuse.num_tokens) == ("pulled", LONG - BLOCK)
    assert outcome.first_token == (await oracle.complete(chat, SAMPLED)).token_ids[0]
    await pair.wait_idle()


async def test_blocks_come_back_from_the_host_tier(
    tmp_path_factory: pytest.TempPathFactory, oracle: GenerationClient
) -> None:
    model = write_model(tmp_path_factory.mktemp("slow"), slow=True)
    tiers = ("--kv-cache-config.max-tokens=1024", "--kv-cache-config.host-cache-size=40000000")
    async with server_pair(model, PATIENT, generation_flags=tiers) as servers:
        await servers.context.first_token(random_prompt(LONG, seed=99), FIRST)
        chat = random_prompt(LONG, seed=9)
        await servers.generation.complete(chat, SAMPLED)
        await servers.generation.complete(random_prompt(940, seed=10), SAMPLED)
        outcome = await servers.context.first_token(chat, SAMPLED, reuse_from=servers.generation.hint(LONG))
        assert outcome.reuse.verdict == "pulled"
        assert outcome.reuse.num_tokens == 512  # Half of its pool is lent at most.
        assert outcome.first_token == (await oracle.complete(chat, SAMPLED)).token_ids[0]
        await servers.wait_idle()


async def test_either_side_can_be_told_not_to(tmp_path_factory: pytest.TempPathFactory, pair: Pair) -> None:
    model = write_model(tmp_path_factory.mktemp("slow"), slow=True)
    async with server_pair(model, "--cache-transceiver-config.pull-back=false") as unwilling:
        chat = random_prompt(LONG, seed=11)
        await pair.generation.complete(chat, FIRST)
        outcome = await unwilling.context.first_token(chat, FIRST, reuse_from=pair.generation.hint(LONG))
        assert not outcome.HasField("reuse")
        await unwilling.generation.complete(chat, FIRST)
        outcome = await pair.context.first_token(chat, FIRST, reuse_from=unwilling.generation.hint(LONG))
        assert outcome.HasField("reuse")
        assert outcome.reuse.num_tokens == 0


# Hints that lead nowhere: the prompt is computed, and nothing is lost but a moment.


async def answered(
    context: ContextClient, oracle: GenerationClient, chat: list[int], hint: control_pb2.PrefixHint
) -> control_pb2.PrefixReuse:
    outcome = await context.first_token(chat, SAMPLED, reuse_from=hint)
    assert outcome.first_token == (await oracle.complete(chat, SAMPLED)).token_ids[0]
    assert outcome.reuse.spent_s < LITTLE_S
    return outcome.reuse


async def test_a_hint_that_is_stale_or_wrong_fails_no_prompt(pair: Pair, oracle: GenerationClient) -> None:
    right = pair.generation.hint(LONG)
    wrong = [
        control_pb2.PrefixHint(address="127.0.0.1:1", instance_id="gone", epoch=1, num_tokens=LONG),
        control_pb2.PrefixHint(address=right.address, instance_id="somebody-else", epoch=right.epoch, num_tokens=LONG),
        control_pb2.PrefixHint(address=pair.context.address, instance_id="not-one", epoch=1, num_tokens=LONG),
        control_pb2.PrefixHint(address="no such host", instance_id="nowhere", epoch=1, num_tokens=10**6),
    ]
    for seed, hint in enumerate(wrong):
        reuse = await answered(pair.context, oracle, random_prompt(LONG, seed=20 + seed), hint)
        assert reuse.verdict in {"failed", "too_late"}
    await pair.wait_idle()


async def test_a_generation_server_that_is_struck_down_while_it_is_asked_delays_a_prompt_a_little(
    tmp_path_factory: pytest.TempPathFactory, oracle: GenerationClient
) -> None:
    """First it stands still for a while, then it is killed."""
    model = write_model(tmp_path_factory.mktemp("slow"), slow=True)
    async with server_pair(model, PATIENT) as servers:
        await servers.context.first_token(random_prompt(LONG, seed=99), FIRST)
        known = random_prompt(LONG, seed=12)
        await servers.generation.complete(known, FIRST)
        hint = servers.generation.hint(LONG)
        assert (await answered(servers.context, oracle, known, hint)).verdict == "pulled"  # They are connected.
        for seed, number in ((13, signal.SIGSTOP), (14, signal.SIGKILL)):
            chat = random_prompt(LONG, seed=seed)
            await servers.generation.complete(chat, FIRST)
            servers.generation_process.signal(signal.SIGSTOP)
            asking = asyncio.create_task(answered(servers.context, oracle, chat, hint))
            await asyncio.sleep(0)
            if number is signal.SIGKILL:
                servers.generation_process.signal(number)
            assert (await asking).verdict in {"failed", "too_late"}
            if number is signal.SIGSTOP:
                servers.generation_process.signal(signal.SIGCONT)
                await servers.generation.wait_idle()
            await servers.context.wait_idle()
