"""Random workloads, a seed each: whatever happens, the tokens are the oracle's and every block comes back."""

from __future__ import annotations

import os
import random
import sys
import time
from collections import Counter

import pytest

from disaggregated.engine.api import EngineRequest, RequestKind, TokensSampled
from disaggregated.engine.engine import LLMEngine
from disaggregated.engine.engine_limits import EngineLimits, EngineOptions
from disaggregated.sampling_params import SamplingParams
from tests.support.engine_workload import Foresight, Workload
from tests.support.fake_device import FakeDevice
from tests.support.fake_runner import VOCAB_SIZE, oracle

SOAK_S = float(os.environ.get("DISAGG_SOAK_S", "600"))
EVERYTHING = (
    *("requests finished", "requests refused", "requests cancelled", "leases released", "transfers failed"),
    *("steps launched ahead", "prompt tokens found in the cache", "drafts accepted", "preemptions"),
    *("sequences swapped out", "blocks offloaded", "blocks onboarded", "steps with blocks in quarantine"),
)


@pytest.mark.parametrize("seed", range(300))
def test_every_request_gets_the_tokens_it_would_get_alone_and_every_block_comes_back(seed: int) -> None:
    Workload(seed, num_requests=25).run()


def test_a_few_seeds_have_everything_that_may_happen() -> None:
    counts: Counter[str] = Counter()
    for seed in range(2000, 2040):
        workload = Workload(seed, num_requests=25)
        workload.run()
        counts += workload.counts
    assert [name for name in EVERYTHING if not counts[name]] == []
    assert counts["drafts"] > counts["drafts accepted"]


@pytest.mark.soak
@pytest.mark.timeout(SOAK_S + 600)
def test_the_same_holds_for_ten_minutes_of_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    """DISAGG_SOAK_S seconds of it, if that is set; prints the seeds and what they held."""
    end_s = time.monotonic() + SOAK_S
    first = seed = 1_000_000
    counts: Counter[str] = Counter()
    while time.monotonic() < end_s:
        workload = Workload(seed, num_requests=60)
        try:
            workload.run()
        except BaseException as error:
            error.add_note(f"the workload of seed {seed}")
            raise
        counts += workload.counts
        seed += 1
    with capsys.disabled():
        lines = [f"{count:>14,} {name}" for name, count in sorted(counts.items())]
        sys.stdout.write("\n".join(["", f"seeds {first} to {seed - 1}, no violation", *lines, ""]))
    assert SOAK_S < 60 or [name for name in EVERYTHING if not counts[name]] == []


def engine_of_a_server(draw: random.Random, left: list[int], *, max_seq_len: int) -> LLMEngine:
    return LLMEngine(
        FakeDevice(num_blocks=20, block_size=4),
        EngineLimits(
            num_blocks=20,
            block_size=4,
            max_num_tokens=draw.choice([1, 5, 64]),
            max_batch_size=2,
            max_seq_len=max_seq_len,
        ),
        EngineOptions(speculation=Foresight(draw, lambda _: left) if draw.random() < 0.8 else None),
        clock=lambda: 0.0,
    )


@pytest.mark.parametrize("seed", range(60))
def test_a_sequence_that_loses_its_server_amid_drafts_goes_on_elsewhere_with_the_same_tokens(seed: int) -> None:
    """As the orchestrator continues it: what was emitted becomes a part of the prompt; no drafts travel."""
    draw = random.Random(seed)
    prompt = [draw.randrange(VOCAB_SIZE) for _ in range(draw.randrange(1, 20))]
    sampling = SamplingParams(
        max_tokens=40, min_tokens=draw.choice([0, 20]), temperature=1.0, seed=seed, stop_token_ids=frozenset({1, 2})
    )
    tokens, finish_reason = oracle(prompt, sampling, max_seq_len=64)
    emitted: list[int] = []
    reason = None
    for server in range(100):
        left = sampling.after(len(emitted)) if emitted else sampling
        engine = engine_of_a_server(draw, tokens[len(emitted) :], max_seq_len=64)
        request = EngineRequest(
            request_id=f"attempt-{server}", kind=RequestKind.FULL, token_ids=[*prompt, *emitted], sampling=left
        )
        engine.submit(request)
        while engine.has_work and draw.random() < 0.8:
            for event in engine.step():
                if isinstance(event, TokensSampled):
                    assert event.first_position == len(prompt) + len(emitted)
                    emitted.extend(event.token_ids)
                    reason = event.finish_reason
            engine.check_integrity()
        if reason is not None:
            break
    assert (emitted, reason) == (tokens, finish_reason)
