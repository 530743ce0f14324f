"""Everything that needs a GPU, in parts that fail apart: `python -m benchmarks.gpu [--out FOLDER] [--only NAME …]`.

Each part is a process with a timeout of its own, so that a crash or a hang costs that part alone; all together they end
within `TOTAL_S`. It runs with what is installed: no environment is made and nothing is downloaded. Figures go to
FOLDER/gpu.jsonl as they come, everything that was printed to FOLDER/gpu.log, and the report to FOLDER/gpu.md and
benchmarks/results/gpu.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import IO, Final

from benchmarks.gpu.collect import PartResult, write_report

ROOT: Final = pathlib.Path(__file__).parents[2]
TOTAL_S: Final = 530.0
"""Of all parts; a machine is lent for ten minutes at a time."""


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    name: str
    arguments: Sequence[str]
    """Of `python`."""
    timeout_s: float
    needs: Sequence[str] = ()
    """Modules without which it cannot run."""


def _tests(*paths: str) -> list[str]:
    return ["-m", "pytest", "-c", "tests/gpu/pytest.ini", "--rootdir", ".", *paths]


PARTS: Final = (
    Part("kernels", _tests("tests/unit/engine/cuda/test_kernels.py", "tests/unit/engine/cuda/test_sampling.py"), 100.0,
         ("pytest", "triton")),
    Part("runner", _tests("tests/gpu/test_cuda_runner.py"), 110.0, ("pytest", "triton", "xxhash", "tokenizers")),
    Part("bf16", ["-m", "benchmarks.gpu.engine", "bfloat16"], 130.0, ("triton", "xxhash", "tokenizers")),
    Part("ipc", _tests("tests/unit/engine/cuda/test_block_kernels.py", "tests/gpu/test_cuda_ipc.py"), 60.0,
         ("pytest", "triton", "cuda.bindings", "xxhash", "google.protobuf")),
    Part("copies", ["-m", "benchmarks.gpu.ipc"], 60.0, ("triton", "cuda.bindings", "xxhash", "google.protobuf")),
    Part("serving", _tests("tests/gpu/test_serving.py"), 90.0, ("pytest", "triton", "grpc", "google.protobuf")),
    Part("fp8", ["-m", "benchmarks.gpu.engine", "fp8"], 100.0, ("triton", "xxhash", "tokenizers")),
    Part("pair", ["-m", "benchmarks.gpu.pair"], 120.0, ("triton", "grpc", "google.protobuf")),
    Part("pair staged", ["-m", "benchmarks.gpu.pair", "staged"], 120.0, ("triton", "grpc", "google.protobuf")),
    Part("attention", ["-m", "benchmarks.gpu.attention"], 60.0, ("triton",)),
    Part("flashinfer", _tests("tests/gpu/test_flashinfer.py"), 120.0, ("pytest", "triton", "flashinfer")),
    Part("bf16 flashinfer", ["-m", "benchmarks.gpu.engine", "bfloat16", "flashinfer"], 120.0,
         ("triton", "flashinfer", "xxhash", "tokenizers")),
    Part("models", _tests("tests/gpu/test_cuda_models.py", "tests/gpu/test_cuda_ops.py"), 90.0,
         ("pytest", "transformers")),
)  # fmt: skip
"""The most telling first: what there is no time left for is skipped."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=os.environ.get("OUT", ROOT / "build" / "gpu"))
    parser.add_argument("--only", nargs="*", default=[part.name for part in PARTS], help="names of parts")
    arguments = parser.parse_args()
    if (reason := no_device()) is not None:
        print(f"GPU checks and benchmarks were not run: {reason}")
        return 0
    out = pathlib.Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.jsonl").write_text("")
    results = []
    deadline_s = time.monotonic() + TOTAL_S
    with (out / "gpu.log").open("w") as log:
        for part in PARTS:
            if part.name in arguments.only:
                results.append(run(part, out, log, left_s=deadline_s - time.monotonic()))
                print(results[-1])
    figures = [json.loads(line) for line in (out / "gpu.jsonl").read_text().splitlines()]
    for path in (out / "gpu.md", ROOT / "benchmarks" / "results" / "gpu.md"):
        write_report(path, results, figures)
    print((out / "gpu.md").read_text())
    return int(any(result.outcome == "failed" for result in results))


def no_device() -> str | None:
    """Why nothing can be run here, in words."""
    if importlib.util.find_spec("torch") is None:
        return f"{sys.executable} has no torch"
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    return None


def missing(part: Part) -> list[str]:
    return [name for name in part.needs if not _is_there(name)]


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # The package around it is not there.
        return False


def run(part: Part, out: pathlib.Path, log: IO[str], *, left_s: float) -> PartResult:
    if lacking := missing(part):
        return PartResult(part.name, "skipped", f"not installed: {', '.join(lacking)}", 0.0)
    if left_s < 20.0:
        return PartResult(part.name, "skipped", "no time was left", 0.0)
    log.write(f"\n===== {part.name}\n")
    log.flush()
    start_s = time.monotonic()
    timeout_s = min(part.timeout_s, left_s)
    environ = {**os.environ, "DISAGG_GPU_FIGURES": str(out / "gpu.jsonl"), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, *part.arguments], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environ,
        start_new_session=True,
    )  # fmt: skip
    try:
        code = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        _end(process)
        return PartResult(part.name, "failed", f"not over after {timeout_s:.0f} s", time.monotonic() - start_s)
    _end(process)  # Servers that it left behind.
    words = "" if code == 0 else f"exit code {code}; gpu.log says why"
    return PartResult(part.name, "passed" if code == 0 else "failed", words, time.monotonic() - start_s)


def _end(process: subprocess.Popen[bytes]) -> None:
    """The part and all that it started: they are one session, which is ours."""
    try:
        os.killpg(process.pid, 9)
    except ProcessLookupError:
        return
    process.wait()


if __name__ == "__main__":
    sys.exit(main())
