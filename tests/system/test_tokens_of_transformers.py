"""Our greedy tokens against transformers in fp32 on the real model; each difference is explained by its logit gap."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any, Final

import pytest
import torch
import transformers

from benchmarks import report
from disaggregated import model_files
from disaggregated.sampling_params import SamplingParams
from disaggregated.text import Tokenizer
from tests.support.oracle import OneProcess
from tests.support.prompts import Prompt, forty_prompts

MODEL: Final = "smollm2-135m-instruct"
TIE: Final = 1e-3
"""Logits closer than this are a tie that either summation order may win; ordinary gaps are above 0.1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """Where the two part, and how close transformers itself found the two tokens."""

    name: str
    index: int
    logit_gap: float


class Transformers:
    def __init__(self, path: pathlib.Path) -> None:
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def generate(self, prompt: Prompt, num_new: int) -> list[int]:
        input_ids = torch.tensor([prompt.token_ids])
        generated = self._model.generate(
            input_ids, attention_mask=torch.ones_like(input_ids), do_sample=False, max_new_tokens=num_new,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return [int(token) for token in generated[0, len(prompt.token_ids) :]]

    def gap(self, token_ids: list[int], theirs: int, ours: int) -> float:
        with torch.inference_mode():
            logits = self._model(torch.tensor([token_ids])).logits[0, -1]
        return float(logits[theirs] - logits[ours])


def compare(oracle: OneProcess, peer: Transformers, prompt: Prompt, num_new: int) -> Difference | None:
    ours = oracle.generate(prompt.token_ids, SamplingParams(max_tokens=num_new))
    theirs = peer.generate(prompt, num_new)
    for index, (our_token, their_token) in enumerate(zip(ours, theirs, strict=True)):
        if our_token != their_token:
            gap = peer.gap([*prompt.token_ids, *theirs[:index]], their_token, our_token)
            return Difference(name=prompt.name, index=index, logit_gap=gap)
    return None


def differences(indices: slice, num_new: int) -> tuple[int, list[Difference]]:
    path = model_files.resolve(MODEL).path
    prompts = forty_prompts(Tokenizer.load(path))[indices]
    oracle, peer = OneProcess(MODEL), Transformers(path)
    found = [compare(oracle, peer, prompt, num_new) for prompt in prompts]
    return len(prompts), [difference for difference in found if difference is not None]


def test_two_prompts_give_the_tokens_of_transformers() -> None:
    assert differences(slice(3, 9, 5), 16) == (2, [])


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_forty_prompts_give_the_tokens_of_transformers() -> None:
    num_prompts, found = differences(slice(None), 64)
    rows = [report.Row(what="prompts", seen=f"{num_prompts - len(found)} of {num_prompts} the same", bar="39 of 40",
                       holds=len(found) <= 1)]  # fmt: skip
    rows += [
        report.Row(what=f"{d.name}, token {d.index}", seen=f"logit gap {d.logit_gap:.2e}", bar=f"a tie: under {TIE}",
                   holds=d.logit_gap < TIE)
        for d in found
    ]  # fmt: skip
    report.write("tokens-transformers", "Greedy tokens against transformers, fp32, 64 new tokens", rows)
    assert len(found) <= 1
    assert all(difference.logit_gap < TIE for difference in found)
