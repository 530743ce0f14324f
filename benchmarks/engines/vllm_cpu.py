"""vLLM on a CPU, by its own offline API. Run by the interpreter of vLLM's environment, with this repository as its
working directory:

PYTHON -m benchmarks.engines.vllm_cpu MODEL THREADS
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

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


def seconds(llm: Any, prompts: list[list[int]], max_tokens: int) -> float:
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    return time.perf_counter() - start


def main(model: str, threads: int) -> None:
    cores = "1" if threads == 1 else f"0-{threads - 1}"
    os.environ.update(
        VLLM_CPU_OMP_THREADS_BIND=cores,
        VLLM_CPU_KVCACHE_SPACE="2",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
    )
    from vllm import LLM

    say("starting; it compiles the model when its cache is cold")
    llm = LLM(model, dtype="float32", max_model_len=4096, max_num_seqs=32, enable_prefix_caching=True)
    measured = Measurement("vLLM CPU", threads)
    seconds(llm, [random_prompt(CONTEXT_LEN, 1)], 4)
    for length in PREFILL_LENGTHS:
        say(f"prefill {length}")
        measured.prefill[str(length)] = [seconds(llm, [random_prompt(length, 10 + i)], 1) for i in range(REPEATS)]
    for batch_size in BATCH_SIZES:
        say(f"decode, batch {batch_size}")
        # One token more than whole blocks: it computes that one again, where else it would compute a whole block.
        prompts = [random_prompt(CONTEXT_LEN + 1, 100 * batch_size + i) for i in range(batch_size)]
        seconds(llm, prompts, 1)  # From here on the prompts are in its prefix cache: what is timed below is decode.
        first = [seconds(llm, prompts, 1) for _ in range(REPEATS)]
        whole = [seconds(llm, prompts, 1 + DECODE_STEPS) for _ in range(REPEATS)]
        measured.decode[str(batch_size)] = [(w - f) / DECODE_STEPS for w, f in zip(whole, first)]  # noqa: B905
    measured.tell()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
