"""Ours, llama.cpp, vLLM and transformers in one run, and the ratios between them.

python -m benchmarks.engines [--threads 1] [--only ours,llama.cpp] [--rounds 2]

Peers live in environments of their own; `python -m benchmarks.peers` makes them. One that is not there is left out, and
the report says so. Ours is measured before and after each peer, so that a machine that gets slower hits both.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from benchmarks import report, roofline
from benchmarks.engines import least_time
from benchmarks.engines.measurement import BATCH_SIZES, PREFILL_LENGTHS, Measurement, told
from benchmarks.peers import Peers
from disaggregated.engine.ops.native_isa import best_isa
from disaggregated.model_files import ModelConfig, resolve

MODEL: Final = "SmolLM2-135M-Instruct"
TIMEOUT_S: Final = 1500
DENSE: Final = "ours float32 dense"
"""The same arithmetic on weights that stay float32, which shows what holding them in fewer bits brings."""
OUR_PRECISIONS: Final[tuple[roofline.Arithmetic, ...]] = ("float32", "int8")
SHARES: Final = {1: 0.65, 8: 0.5}
"""Of the roofline, which decode in float32 must reach."""


def measured(name: str, command: Sequence[str], threads: int) -> Measurement | None:
    """Run one system; None, with the reason on the terminal, when it does not come to an end."""
    print(f"== {name}, {threads} thread{'s' * (threads > 1)}", flush=True)
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[-threads:]))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    lines: list[str] = []
    pinned = ["taskset", "--cpu-list", cores, *command]
    with subprocess.Popen(
        pinned, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        deadline = threading.Timer(TIMEOUT_S, process.kill)
        deadline.start()
        for line in process.stdout:
            lines.append(line)
            if line.startswith("   "):
                print(line, end="", flush=True)
        deadline.cancel()
    found = told("".join(lines))
    if found is None:
        print(f"   {name} ended with {process.returncode} and without a result", flush=True)
    return found


def systems(peers: Peers, model: Path, threads: int) -> Iterator[tuple[str, Sequence[str]]]:
    """Name and command of each; ours come first."""
    ours = [sys.executable, "-m", "benchmarks.engines.ours", str(model), "--threads", str(threads), "--precision"]
    for precision in OUR_PRECISIONS:
        yield f"ours {precision}", [*ours, precision]
    yield DENSE, [*ours, "float32", "--dense"]
    tail = [str(model), str(threads)]
    yield "transformers", [sys.executable, "-m", "benchmarks.engines.transformers_eager", *tail]
    if peers.llama_cpp:
        for kind, gguf in peers.llama_cpp.models.items():
            words = [str(peers.llama_cpp.binaries), str(gguf), str(threads), f"llama.cpp {kind}"]
            yield f"llama.cpp {kind}", [sys.executable, "-m", "benchmarks.engines.llama_cpp", *words]
    if peers.vllm_python:
        yield "vLLM CPU", [str(peers.vllm_python), "-m", "benchmarks.engines.vllm_cpu", *tail]


def run(threads: int, only: Sequence[str], rounds: int) -> dict[str, Measurement]:
    model = resolve(MODEL).path
    chosen = [
        (name, command)
        for name, command in systems(Peers.found(), model, threads)
        if not only or any(name.lower().startswith(word.lower()) for word in only)
    ]
    ours = [(name, command) for name, command in chosen if name.startswith("ours")]
    results: dict[str, Measurement] = {}
    for _ in range(rounds):
        for name, command in [*chosen, *ours]:
            found = measured(name, command, threads)
            if found and name in results:
                results[name].add(found)
            elif found:
                results[name] = found
    return results


def rows(results: dict[str, Measurement], threads: int) -> Iterator[report.Row]:
    model = ModelConfig.load(resolve(MODEL).path)
    limit = roofline.measure(best_isa(), threads)
    yield report.Row(what="limits of the machine", seen=str(limit))
    for name, system in results.items():
        yield report.Row(what=f"{name}: tok/s", seen=speeds(system))
        yield from rows_of_weights(name, system)
    for precision in OUR_PRECISIONS:
        if ours := results.get(f"ours {precision}"):
            yield from share_rows(ours, precision, limit, model)
    for bar in BARS:
        if bar.ours in results and bar.theirs in results:
            yield bar.row(results)


def rows_of_weights(name: str, system: Measurement) -> Iterator[report.Row]:
    if system.weight_bytes:
        forms = "; ".join(f"{count / 1e6:.0f} MB in {form}" for form, count in system.weight_bytes.items())
        yield report.Row(what=f"{name}: weights that a decode step reads", seen=forms)


def speeds(system: Measurement) -> str:
    prefill = [f"prefill {n} {n / system.prefill_s(n):.0f}" for n in PREFILL_LENGTHS if str(n) in system.prefill]
    decode = [f"batch {n} {n / system.decode_s(n):.0f}" for n in BATCH_SIZES if str(n) in system.decode]
    return ", ".join(prefill + decode)


def share_rows(
    system: Measurement, precision: roofline.Arithmetic, limit: roofline.Roofline, model: ModelConfig
) -> Iterator[report.Row]:
    for batch_size in BATCH_SIZES:
        least_s = least_time.decode_s(
            limit, model, batch_size, precision, weight_bytes=sum(system.weight_bytes.values())
        )
        share = least_s / system.decode_s(batch_size)
        bar = SHARES.get(batch_size) if precision == "float32" else None
        yield report.Row(
            what=f"{system.system}: decode, batch {batch_size}, share of the roofline",
            seen=f"{share:.2f}",
            bar=f"at least {bar}" if bar else "",
            holds=share >= bar if bar else None,
        )
    for length in PREFILL_LENGTHS:
        share = least_time.prefill_s(limit, model, length, precision) / system.prefill_s(length)
        yield report.Row(what=f"{system.system}: prefill {length}, share of the roofline", seen=f"{share:.2f}")


class Bar:
    """Ours must be so many times as fast as another."""

    def __init__(self, ours: str, what: str, theirs: str, least: float) -> None:
        self.ours, self.what, self.theirs, self.least = ours, what, theirs, least

    def row(self, results: dict[str, Measurement]) -> report.Row:
        ratio = self._seconds(results[self.theirs]) / self._seconds(results[self.ours])
        return report.Row(
            what=f"{self.ours}, {self.what} ÷ {self.theirs}",
            seen=f"{ratio:.2f}",
            bar=f"at least {self.least}",
            holds=ratio >= self.least,
        )

    def _seconds(self, system: Measurement) -> float:
        kind, _, number = self.what.partition(" ")
        return system.prefill_s(int(number)) if kind == "prefill" else system.decode_s(int(number.split()[-1]))


BARS: Final = (
    Bar("ours float32", "decode batch 1", "llama.cpp f32", 1.0),
    Bar("ours float32", "decode batch 1", "vLLM CPU", 1.7),
    *(Bar("ours float32", f"decode batch {n}", "vLLM CPU", 1.25) for n in (8, 32)),
    *(Bar("ours float32", f"decode batch {n}", "transformers", 1.5) for n in (8, 32)),
    Bar("ours float32", "decode batch 1", DENSE, 2.0),
    *(Bar("ours float32", f"decode batch {n}", DENSE, 1.0) for n in (8, 32)),
    *(Bar("ours float32", f"prefill {n}", "vLLM CPU", 1.1) for n in PREFILL_LENGTHS),
    Bar("ours int8", "decode batch 8", "vLLM CPU", 3.0),
    Bar("ours int8", "decode batch 1", "llama.cpp q8_0", 0.9),
    Bar("ours int8", "decode batch 8", "llama.cpp q8_0", 2.0),
    *(Bar("ours int8", f"prefill {n}", "ours float32", 1.5) for n in PREFILL_LENGTHS),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="beginnings of names, with commas between them")
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    only = [word for word in arguments.only.split(",") if word]
    results = run(arguments.threads, only, arguments.rounds)
    threads = arguments.threads
    report.write(
        f"engines-{threads}-thread{'s' * (threads > 1)}",
        f"Engines beside each other, {MODEL}, {threads} thread{'s' * (threads > 1)} each",
        list(rows(results, threads)),
        notes="Decode: each sequence begins with 512 tokens. Roofline: bytes or sums, whichever takes longer.",
    )


if __name__ == "__main__":
    main()
