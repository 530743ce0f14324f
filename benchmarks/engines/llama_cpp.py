"""llama.cpp by its own tools: llama-bench for prefill and a single stream, llama-batched-bench for batches.

python -m benchmarks.engines.llama_cpp FOLDER_OF_BINARIES MODEL.gguf THREADS NAME
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.engines.measurement import (
    BATCH_SIZES,
    CONTEXT_LEN,
    DECODE_STEPS,
    PREFILL_LENGTHS,
    Measurement,
    say,
)

REPEATS = 3
TIMEOUT_S = 600


def output(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode:
        raise SystemExit(f"{command[0]} ended with {done.returncode}: {done.stderr[-500:]}")
    return done.stdout


def bench(folder: Path, model: str, threads: int) -> list[dict[str, Any]]:
    """One record a test; `samples_ns` are the nanoseconds of each repetition of all its tokens."""
    words = ["-m", model, "-t", str(threads), "-r", str(REPEATS), "-o", "json"]
    prompts = ",".join(map(str, PREFILL_LENGTHS))
    records: list[dict[str, Any]] = json.loads(output([str(folder / "llama-bench"), *words, "-p", prompts, "-n", "0"]))
    single = ["-p", "0", "-n", str(DECODE_STEPS), "-d", str(CONTEXT_LEN)]
    records += json.loads(output([str(folder / "llama-bench"), *words, *single]))
    return records


def batched_seconds(folder: Path, model: str, threads: int, batch_size: int) -> float:
    """Seconds a step of `batch_size` sequences of their own."""
    size = batch_size * (CONTEXT_LEN + DECODE_STEPS + 8)
    lengths = ["-npp", str(CONTEXT_LEN), "-ntg", str(DECODE_STEPS), "-npl", str(batch_size), "-c", str(size)]
    command = [str(folder / "llama-batched-bench"), "-m", model, "-t", str(threads), "-tb", str(threads), *lengths]
    lines = output([*command, "--output-format", "jsonl"]).splitlines()
    record = json.loads(next(line for line in lines if line.startswith("{")))
    return float(record["t_tg"]) / DECODE_STEPS


def main(folder: Path, model: str, threads: int, name: str) -> None:
    measured = Measurement(name, threads)
    say("prefill and a single stream")
    for record in bench(folder, model, threads):
        seconds = [sample / 1e9 for sample in record["samples_ns"]]
        if record["n_prompt"]:
            measured.prefill[str(record["n_prompt"])] = seconds
        else:
            measured.decode["1"] = [value / DECODE_STEPS for value in seconds]
    for batch_size in BATCH_SIZES[1:]:
        say(f"decode, batch {batch_size}")
        measured.decode[str(batch_size)] = [batched_seconds(folder, model, threads, batch_size)]
    measured.tell()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4])
