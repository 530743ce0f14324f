from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from orchestrator.waterfall import steps, waterfall


def attempt(**fields: Any) -> dict[str, Any]:
    return {
        "context_instance": "context-0",
        "generation_instance": "generation-0",
        "began_s": 0.02,
        "ended_s": 1.0,
        "first_token_s": 0.32,
        "num_tokens": 20,
        "prefill_queue_s": 0.01,
        "prefill_compute_s": 0.28,
        "transfer_s": 0.2,
        "exposed_s": 0.005,
        "transfer_bytes": 23 << 20,
        "hidden_bytes": 21 << 20,
        "transport": "SHM",
        "reuse_from": "",
        "reuse_s": 0.0,
        "num_pulled_tokens": 0,
        **fields,
    }


def story(**fields: Any) -> dict[str, Any]:
    return {
        "e2e_s": 1.0,
        "ttft_s": 0.32,
        "ttft_parts": {"prepare_s": 0.01, "queue_s": 0.01},
        "tpot_s": 0.034,
        "num_prompt_tokens": 512,
        "num_tokens": 20,
        "attempts": [attempt()],
        **fields,
    }


def test_the_steps_come_in_the_order_of_time() -> None:
    found = steps(story())
    assert [step.name for step in found] == [
        "check, render, tokenize",
        "wait in the queue",
        "prefill",
        "KV transfer, 23.0 MiB",
        "decode, 20 tokens",
    ]
    prefill, transfer, decode = found[2:]
    assert transfer.begin_s + transfer.duration_s == decode.begin_s
    assert abs(prefill.begin_s + prefill.duration_s + 0.005 - decode.begin_s) < 1e-9
    assert decode.begin_s + decode.duration_s == 1.0
    assert transfer.where == "SHM, 91% hidden"


def test_a_prompt_prefilled_where_it_decodes_has_no_transfer() -> None:
    found = steps(story(attempts=[attempt(context_instance="", transfer_bytes=0)]))
    assert [(step.name, step.where) for step in found[2:]] == [
        ("prefill", "generation-0"),
        ("decode, 20 tokens", "generation-0"),
    ]


def test_what_was_brought_back_stands_before_the_prefill() -> None:
    brought = attempt(reuse_from="generation-7-abc", reuse_s=0.02, num_pulled_tokens=384, prefill_compute_s=0.1)
    back, prefill = steps(story(attempts=[brought]))[2:4]
    assert (back.name, back.where) == ("bring 384 tokens back", "generation-7-abc")
    assert back.begin_s == 0.02
    assert prefill.begin_s == pytest.approx(back.begin_s + back.duration_s + 0.01)


def test_each_attempt_of_a_re_dispatched_request_is_shown() -> None:
    found = steps(story(attempts=[attempt(ended_s=0.5), attempt(began_s=0.5, generation_instance="generation-1")]))
    assert [step.where for step in found if step.name.startswith("decode")] == ["generation-0", "generation-1"]


def test_a_request_that_ended_before_its_first_token_can_be_shown() -> None:
    early = attempt(first_token_s=None, ended_s=None, transfer_bytes=0, prefill_compute_s=0.0)
    told = story(ttft_s=None, ttft_parts={}, tpot_s=None, num_tokens=0, attempts=[early])
    out = io.StringIO()
    Console(file=out, width=120).print(waterfall(told))
    assert "512 tokens in, 0 out" in out.getvalue()


def test_no_bar_leaves_the_picture() -> None:
    out = io.StringIO()
    Console(file=out, width=160).print(waterfall(story(e2e_s=0.3)))
    assert max(map(len, out.getvalue().splitlines())) < 80
    assert "SHM, 91% hidden" in out.getvalue()
