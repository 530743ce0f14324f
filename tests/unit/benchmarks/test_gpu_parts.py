"""`make gpu` loses no part to another, and says what it did not do."""

from __future__ import annotations

import contextlib
import json
import pathlib
import subprocess
import sys
from typing import Any

import psutil
import pytest
import torch

from benchmarks.gpu import llama
from benchmarks.gpu.__main__ import PARTS, ROOT, Part, run
from benchmarks.gpu.collect import PartResult, report


def outcome(tmp_path: pathlib.Path, code: str, *, timeout_s: float = 100.0, left_s: float = 110.0) -> PartResult:
    with (tmp_path / "log").open("w") as log:
        return run(Part("part", ["-c", code], timeout_s), tmp_path, log, left_s=left_s)


def test_a_part_passes_or_fails_by_its_exit_code(tmp_path: pathlib.Path) -> None:
    assert outcome(tmp_path, "print('here')").outcome == "passed"
    assert "here" in (tmp_path / "log").read_text()
    failed = outcome(tmp_path, "raise SystemExit(3)")
    assert (failed.outcome, failed.words) == ("failed", "exit code 3; gpu.log says why")


def test_a_part_that_hangs_is_ended_with_all_that_it_started(tmp_path: pathlib.Path) -> None:
    code = "import subprocess; child = subprocess.Popen(['sleep', '60']); print(child.pid, flush=True); child.wait()"
    hung = outcome(tmp_path, code, timeout_s=3.0)
    assert (hung.outcome, hung.words) == ("failed", "not over after 3 s")
    child_pid = int((tmp_path / "log").read_text().split()[-1])
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(child_pid).wait(timeout=10)


def test_a_part_without_its_modules_or_without_time_is_skipped(tmp_path: pathlib.Path) -> None:
    with (tmp_path / "log").open("w") as log:
        lacking = run(Part("part", [], 1.0, ["os", "no_such_module", "no.such"]), tmp_path, log, left_s=100.0)
    assert (lacking.outcome, lacking.words) == ("skipped", "not installed: no_such_module, no.such")
    assert outcome(tmp_path, "", left_s=5.0).words == "no time was left"


def test_parts_keep_their_figures_even_when_they_die(tmp_path: pathlib.Path) -> None:
    code = "from benchmarks.gpu.figures import keep; keep('a', 'b', share=0.5, of='c'); import os; os._exit(9)"
    assert outcome(tmp_path, code).outcome == "failed"
    assert json.loads((tmp_path / "gpu.jsonl").read_text()) == {"what": "a", "seen": "b", "share": 0.5, "of": "c"}


def test_the_report_tells_every_part_and_every_figure() -> None:
    results = [PartResult("kernels", "passed", "", 12.4), PartResult("fp8", "skipped", "no time was left", 0.0)]
    figures: list[dict[str, Any]] = [
        {"what": "decode", "seen": "5 ms", "share": 0.8, "of": "bandwidth"},
        {"what": "start", "seen": "9 s"},
    ]
    text = report(results, figures, machine="a GPU", commit="abc")
    assert "| kernels | passed | 12 |  |" in text
    assert "| fp8 | skipped | 0 | no time was left |" in text
    assert "| decode | 5 ms | 0.80 | bandwidth |" in text
    assert "| start | 9 s |  |  |" in text


def test_a_report_without_figures_says_that_nothing_was_run() -> None:
    assert "not yet run on a GPU" in report([], [], machine="none", commit="abc")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line_and_is_no_failure() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=110
    )
    assert done.returncode == 0
    assert done.stdout.startswith("GPU checks and benchmarks were not run: torch ")
    assert done.stdout.count("\n") == 1


def test_every_file_that_a_part_names_is_there() -> None:
    for part in PARTS:
        for word in part.arguments:
            assert not word.endswith((".py", ".ini")) or (ROOT / word).exists(), word


def test_bytes_and_operations_are_those_of_eight_billion_weights() -> None:
    assert llama.LINEAR_WEIGHTS == 6_979_321_856
    assert llama.decode_bytes(1, 0, weight_bytes=2, kv_bytes=2) == pytest.approx(15.0e9, rel=0.01)
    kv = llama.decode_bytes(1, 1000, weight_bytes=2, kv_bytes=2) - llama.decode_bytes(1, 0, weight_bytes=2, kv_bytes=2)
    assert kv == 1000 * 131_072
    assert llama.prefill_flops(8192) == pytest.approx(2 * 7e9 * 8192 + 17.6e12, rel=0.01)
