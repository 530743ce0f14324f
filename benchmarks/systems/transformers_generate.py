"""Hugging Face transformers, which has no server: `generate` on static batches, both cores.

python -m benchmarks.systems.transformers_generate NUM_THREADS SIZES_AS_JSON

Prints one line of JSON: load a (one sequence; the first token's time is that of `max_new_tokens=1`) and load b (two
batches, one after the other, as 8 clients with 16 requests would wait for them).
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import torch
import transformers

from benchmarks.systems.loads import prompt_of
from disaggregated.model_files import resolve


class Generator:
    def __init__(self, model: str, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        path = resolve(model).path
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def seconds(self, prompts: list[list[int]], num_new: int) -> float:
        input_ids = torch.tensor(prompts)
        begin_s = time.perf_counter()
        self._model.generate(
            input_ids, attention_mask=torch.ones_like(input_ids), do_sample=False, max_new_tokens=num_new,
            min_new_tokens=num_new, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return time.perf_counter() - begin_s


def main(num_threads: int, sizes: dict[str, Any]) -> None:
    generator = Generator("smollm2-135m-instruct", num_threads)
    generator.seconds([prompt_of("warm/0", 64)], 4)
    num_in, num_out = sizes["tokens_a"]
    firsts, wholes = [], []
    for run in range(sizes["num_runs_a"]):
        prompt = prompt_of(f"a/{run}", num_in)
        firsts.append(generator.seconds([prompt], 1))
        wholes.append(generator.seconds([prompt], num_out))
    first_s, whole_s = statistics.median(firsts), statistics.median(wholes)
    num_in, num_out = sizes["tokens_b"]
    batch_size, num_requests = sizes["num_clients_b"], sizes["num_requests_b"]
    prompts = [prompt_of(f"b/{index}", num_in) for index in range(num_requests)]
    seconds = sum(
        generator.seconds(prompts[first : first + batch_size], num_out) for first in range(0, num_requests, batch_size)
    )
    found = {
        "a": {"ttft_p50_ms": 1e3 * first_s, "itl_p50_ms": 1e3 * (whole_s - first_s) / (sizes["tokens_a"][1] - 1)},
        "b": {"output_tokens_per_s": num_requests * num_out / seconds, "seconds": seconds},
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]))
