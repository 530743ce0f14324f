"""Predictions are compared with what came of them, and shown to whoever asks why."""

from __future__ import annotations

import io

import pytest
from prometheus_client import CollectorRegistry
from rich.console import Console

from disaggregated.request_life import RequestLife
from orchestrator.routing.candidate import Choice
from orchestrator.routing.decision import Decision, Weighed
from orchestrator.routing.scorecard import Scorecard, cached_verdict
from orchestrator.story import AttemptStory, RequestStory
from orchestrator.waterfall import candidates


def attempt(predicted: int | None, found: int, *, pulled: int = 0, first_token_s: float | None = 1.5) -> AttemptStory:
    made = AttemptStory(
        context_instance="context-1-a",
        generation_instance="generation-2-b",
        decision=Decision(
            weighed=Weighed(0, [("context-1-a", 32, 0.25, 0.0)], ["generation-2-b"], [0.0]),
            num_cached_tokens=predicted,
            ttft_s=0.4,
        ),
        began_s=1.0,
    )
    made.num_cached_tokens, made.num_pulled_tokens, made.first_token_s = found, pulled, first_token_s
    return made


@pytest.mark.parametrize(
    ("told", "verdict"),
    [
        (attempt(32, 32), "exact"),
        (attempt(32, 64, pulled=32), "exact"),
        (attempt(32, 48), "more"),
        (attempt(32, 0), "fewer"),
        (attempt(None, 0), ""),
        (attempt(32, 0, first_token_s=None), ""),
    ],
)
def test_what_was_found_is_compared_with_what_was_predicted(told: AttemptStory, verdict: str) -> None:
    assert cached_verdict(told) == verdict


def test_verdicts_and_the_ratio_of_real_to_estimated_time_are_counted() -> None:
    registry = CollectorRegistry()
    card = Scorecard(registry)
    for told in (attempt(32, 32), attempt(32, 32), attempt(32, 0), attempt(None, 0, first_token_s=None)):
        card.observe(told)

    def count(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, labels)

    assert count("disagg_cached_tokens_predicted_total", verdict="exact") == 2
    assert count("disagg_cached_tokens_predicted_total", verdict="fewer") == 1
    assert count("disagg_ttft_estimate_ratio_count") == 3
    assert count("disagg_ttft_estimate_ratio_sum") == pytest.approx(3 * 0.5 / 0.4)


def test_the_story_tells_the_candidates_and_a_reader_sees_them_as_a_table() -> None:
    story = RequestStory(life=RequestLife("r", now_s=0.0), arrived_s=0.0, num_prompt_tokens=64)
    story.attempts.append(attempt(32, 32))
    (told,) = story.as_json(now_s=2.0)["attempts"]
    assert told["decision"] == {
        "predicted_cached_tokens": 32,
        "predicted_ttft_s": 0.4,
        "candidates": [
            {
                "context": "context-1-a",
                "generation": "generation-2-b",
                "score": 0.25,
                "queue_s": 0.25,
                "compute_s": 0.0,
                "gap_s": 0.0,
                "harm_s": 0.0,
                "num_cached_tokens": 32,
            }
        ],
    }
    out = io.StringIO()
    Console(file=out, width=100).print(candidates(told))
    text = out.getvalue()
    assert "least of 1: first token in 250.0 ms, 32 tokens cached; cached tokens predicted: 32, found: 32" in " ".join(
        text.split()
    )
    assert "times in ms" in " ".join(text.split())
    assert text.splitlines()[-1].split() == ["context-1", "generation-2", "0.25", "250.0", "0.0", "0.0", "0.0", "32"]


def test_the_candidates_of_the_cost_model_are_readable_in_80_columns() -> None:
    parts = {"queue_s": 12.5, "compute_s": 1.2068, "gap_s": 0.2146, "harm_s": 3.25, "num_cached_tokens": 81920.0}
    scored = {"context": "context-949512-5b3e01", "generation": "generation-967412-9c", "score": 17.1714, **parts}
    told = {"why": "least of 2", "num_cached_tokens": 0, "num_pulled_tokens": 0}
    out = io.StringIO()
    decision = {"predicted_cached_tokens": 0, "candidates": [scored]}
    Console(file=out, width=80).print(candidates({**told, "decision": decision}))
    heading, row = out.getvalue().splitlines()[-2:]
    assert heading.split() == ["context", "generation", "score", "queue", "compute", "gap", "harm", "cached"]
    expected = ["context-949512", "generation-967412", "17.17", "12,500.0", "1,206.8", "214.6", "3,250.0", "81920"]
    assert row.split() == expected


def test_an_attempt_that_was_not_weighed_shows_why_alone() -> None:
    story = RequestStory(life=RequestLife("r", now_s=0.0), arrived_s=0.0, num_prompt_tokens=64)
    turn = Decision(context=Choice("c", "its turn among {}", (2,)))
    story.attempts.append(AttemptStory(context_instance="c", generation_instance="g", decision=turn))
    (told,) = story.as_json(now_s=2.0)["attempts"]
    assert told["decision"]["candidates"] == []
    out = io.StringIO()
    Console(file=out, width=100).print(candidates(told))
    assert "context: its turn among 2" in " ".join(out.getvalue().split())
