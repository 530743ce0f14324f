"""The model that everybody starts with, against transformers: same logits, same greedy tokens, with either op table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from disaggregated.engine.ops.api import Ops
from disaggregated.engine.ops.native import load as load_native
from disaggregated.engine.ops.reference import ReferenceOps
from disaggregated.model_files import resolve
from tests.unit.engine.runners import Driven, generate, make_runner, random_blocks

PROMPTS = (
    "The capital of France is",
    "<|im_start|>user\nExplain in two sentences why the sky is blue.<|im_end|>\n<|im_start|>assistant\n",
)
NUM_TOKENS = 16


@pytest.fixture(scope="module")
def model_path() -> Path:
    return resolve("smollm2-135m-instruct").path


@pytest.fixture(scope="module")
def prompts(model_path: Path) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(model_path / "tokenizer.json"))
    return [tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in PROMPTS]


@pytest.fixture(scope="module")
def reference(model_path: Path) -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()


@pytest.fixture(params=["torch", "native"])
def ops(request: pytest.FixtureRequest) -> Ops:
    if request.param == "torch":
        return ReferenceOps()
    if (native := load_native(1)) is None:
        pytest.skip("no native kernels on this machine")
    return native


def test_the_bundled_model_answers_as_transformers_does(
    model_path: Path, prompts: list[list[int]], reference: Any, ops: Ops
) -> None:
    runner = make_runner(model_path, ops=ops)
    with torch.inference_mode():
        expected = [
            reference.generate(torch.tensor([prompt]), max_new_tokens=NUM_TOKENS, do_sample=False)[0, len(prompt) :]
            for prompt in prompts
        ]
        logits = reference(torch.tensor([prompts[1]])).logits[0, -1]
    sequences = [Driven(list(prompt), random_blocks(4, i)) for i, prompt in enumerate(prompts)]
    sequences[1].block_table = random_blocks(4, 1, taken=sequences[0].block_table)
    assert generate(runner, sequences, NUM_TOKENS, [3, 7]) == [tokens.tolist() for tokens in expected]
    ours = runner.logits([Driven(prompts[1], random_blocks(4, 5)).take(512)])[0]
    torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-3)
