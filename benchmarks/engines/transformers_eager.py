"""transformers with a static batch, the way a notebook does it.

python -m benchmarks.engines.transformers_eager MODEL THREADS
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

from benchmarks.engines.measurement import (
    BATCH_SIZES,
    CONTEXT_LEN,
    DECODE_STEPS,
    PREFILL_LENGTHS,
    Measurement,
    random_prompt,
    say,
)

REPEATS = 3


def prefill(model: Any, prompts: list[list[int]]) -> tuple[float, Any, torch.Tensor]:
    start = time.perf_counter()
    out = model(input_ids=torch.tensor(prompts), use_cache=True, logits_to_keep=1)
    tokens = out.logits[:, -1].argmax(-1, keepdim=True)
    return time.perf_counter() - start, out.past_key_values, tokens


def decode(model: Any, prompts: list[list[int]]) -> list[float]:
    _, cache, tokens = prefill(model, prompts)
    seconds = []
    for _ in range(DECODE_STEPS):
        start = time.perf_counter()
        out = model(input_ids=tokens, past_key_values=cache, use_cache=True)
        tokens = out.logits[:, -1].argmax(-1, keepdim=True)
        seconds.append(time.perf_counter() - start)
    return seconds


def main(path: str, threads: int) -> None:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    measured = Measurement("transformers", threads)
    with torch.inference_mode():
        prefill(model, [random_prompt(CONTEXT_LEN, 1)])
        for length in PREFILL_LENGTHS:
            say(f"prefill {length}")
            measured.prefill[str(length)] = [prefill(model, [random_prompt(length, i)])[0] for i in range(REPEATS)]
        for batch_size in BATCH_SIZES:
            say(f"decode, batch {batch_size}")
            prompts = [random_prompt(CONTEXT_LEN, 100 * batch_size + i) for i in range(batch_size)]
            measured.decode[str(batch_size)] = decode(model, prompts)
    measured.tell()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
