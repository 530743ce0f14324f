"""What becomes of raw figures: kept part by part, judged as ratios, drawn."""

from __future__ import annotations

import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import Peers
from benchmarks.systems import plot, verdicts
from benchmarks.systems.catalogue import System, split_document, systems
from benchmarks.systems.results import Results
from benchmarks.systems.serving import SystemFailed, Thread, last_words, put_threads_right, threads_of
from disaggregated.config.load import load_deployment


def load_b(tokens_per_s: float, ttft_ms: float = 100.0, itl_ms: float = 20.0) -> dict[str, Any]:
    return {
        "output_tokens_per_s": tokens_per_s, "ttft_p50_ms": ttft_ms, "itl_p50_ms": itl_ms, "itl_p99_ms": 2 * itl_ms,
    }  # fmt: skip


def load_c(quiet_ms: float, loud_ms: float) -> dict[str, Any]:
    return {
        "quiet_itl_p99_ms": quiet_ms, "itl_p99_ms": loud_ms, "itl_max_ms": 2 * loud_ms,
        "long_prompt_ttft_p50_ms": 5000.0, "long_prompts_at_s": [10.0, 25.0],
        "series": [(0.0, quiet_ms), (10.5, loud_ms), (20.0, quiet_ms)],
    }  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return Results(tmp_path / "systems.json")


def test_parts_are_kept_at_once_and_replaced_one_by_one(results: Results, tmp_path: Path) -> None:
    results.put("vllm", "b", load_b(80))
    results.put("vllm", "a", {"failed": "TimeoutError"})
    results.put("vllm", "b", load_b(86))
    again = Results(tmp_path / "systems.json")
    part = again.get("vllm", "b")
    assert part is not None
    assert part["output_tokens_per_s"] == 86
    assert part["commit"]
    assert again.get("vllm", "a") is None
    assert again.failure("vllm", "a") == "TimeoutError"
    assert again.get("vllm", "c") is None
    assert again.failure("vllm", "c") == ""


def verdict(results: Results, words: str) -> tuple[str, bool | None]:
    [row] = [row for row in verdicts.rows(results) if words in row.what]
    return row.seen, row.holds


def test_throughput_is_judged_against_the_same_peer(results: Results) -> None:
    results.put("vllm", "b", load_b(80))
    results.put("vllm-nixl", "b", load_b(20))
    results.put("ours-fp32", "b", load_b(100))
    results.put("ours-int8", "b", load_b(199))
    assert verdict(results, "1 + 1 cores, fp32 ÷ vLLM CPU 0.32, fp32") == ("1.25 (100.0 ÷ 80.0)", True)
    assert verdict(results, "int8 ÷ vLLM") == ("2.49 (199.0 ÷ 80.0)", False)
    assert verdict(results, "÷ vLLM CPU 0.32, NIXL") == ("5.00 (100.0 ÷ 20.0)", True)


def test_latency_is_judged_against_the_best_of_all_peers(results: Results) -> None:
    results.put("vllm", "b", load_b(80, ttft_ms=500, itl_ms=60))
    results.put("llama-q8_0", "b", load_b(70, ttft_ms=900, itl_ms=30))
    results.put("ours-fp32", "b", load_b(100, ttft_ms=400, itl_ms=40))
    assert verdict(results, "TTFT p50: ours, 1 + 1 cores, fp32") == ("400 ms, 500 ms", True)
    assert verdict(results, "ITL p50: ours, 1 + 1 cores, fp32") == ("40 ms, 30 ms", False)


def test_interference_is_judged_against_quiet_and_the_best_aggregated_peer(results: Results) -> None:
    results.put("ours-fp32", "c", load_c(100, 120))
    results.put("vllm", "c", load_c(60, 900))
    results.put("llama-f32", "c", load_c(60, 590))
    results.put("vllm-nixl", "c", load_c(60, 61))
    assert verdict(results, "÷ quiet") == ("1.20 (120 ms, 100 ms)", True)
    best = "best aggregated peer (llama.cpp server, f32)"
    assert verdict(results, f"ITL p99: {best}") == ("4.9 (590 ms ÷ 120 ms)", False)


def test_a_stall_that_is_too_rare_for_a_percentile_is_judged_by_the_longest_gap(results: Results) -> None:
    results.put("ours-fp32", "c", load_c(100, 120) | {"itl_max_ms": 130.0})
    results.put("vllm", "c", load_c(60, 70) | {"itl_max_ms": 2600.0})
    best = "best aggregated peer (vLLM CPU 0.32, fp32)"
    assert verdict(results, f"ITL p99: {best}") == ("0.6 (70 ms ÷ 120 ms)", False)
    assert verdict(results, f"longest gap: {best}") == ("20.0 (2600 ms ÷ 130 ms)", True)


def test_what_was_not_measured_is_not_judged(results: Results) -> None:
    assert verdicts.rows(results) == []
    results.put("ours-fp32", "b", load_b(100))
    assert verdicts.rows(results) == []


def test_the_table_has_a_line_for_each_system_and_says_what_failed(results: Results) -> None:
    results.put("ours-fp32", "b", load_b(100))
    results.put("ours-fp32", "c", load_c(100, 120))
    results.put("transformers", "b", {"output_tokens_per_s": 50.9})
    results.put("vllm", "a", {"failed": "SystemFailed: exit code 1"})
    lines = verdicts.table(results).splitlines()
    assert lines[2].startswith("| **ours, 1 + 1 cores, fp32** | – | 100.0 | 100 | 20, 40 | 100 → 120 | 1.20 |")
    assert lines[3].startswith("| transformers")
    assert lines[-1] == "- vLLM CPU 0.32, fp32, load a: SystemFailed: exit code 1"


def test_the_plot_is_well_formed_and_has_a_panel_for_each_system(tmp_path: Path) -> None:
    panels = [
        plot.Panel(title="ours <1 + 1>", is_ours=True, part=load_c(50, 60)),
        plot.Panel(title="a & b", is_ours=False, part=load_c(60, 90_000)),
    ]
    path = tmp_path / "interference.svg"
    plot.write(path, panels)
    root = xml.etree.ElementTree.parse(path).getroot()
    lines = [element for element in root.iter() if element.tag.endswith("polyline")]
    assert len(lines) == 2
    height = float(root.attrib["viewBox"].split()[3])
    for line in lines:
        points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
        assert len(points) == 3
        assert all(0 <= x <= plot.WIDTH and 0 <= y <= height for x, y in points)


def test_without_peers_our_own_systems_are_there() -> None:
    found: list[System] = systems(Peers(vllm_python=None, has_nixl=False, llama_cpp=None, mooncake=None))
    assert [system.name for system in found] == [
        "ours-fp32", "ours-int8", "balanced-fp32", "balanced-int8", "mixed-fp32", "mixed-int8",
    ]  # fmt: skip
    assert {system.name for system in found} <= verdicts.TITLES.keys()


def test_our_deployment_is_one_that_can_be_loaded(tmp_path: Path) -> None:
    import yaml

    path = tmp_path / "disagg-config.yml"
    path.write_text(yaml.safe_dump(split_document("float32", 8123, balances=True)))
    config = load_deployment(path, {})
    assert config.context.server.num_threads == config.generation.server.num_threads == 1
    assert not config.context.spread_threads
    assert config.balance_prefill


def test_the_threads_of_this_process_are_where_it_may_run() -> None:
    import os

    cores = tuple(sorted(os.sched_getaffinity(0)))
    threads = threads_of(os.getpid())
    assert threads
    assert all(isinstance(thread, Thread) and thread.cores <= set(cores) for thread in threads)
    assert put_threads_right(os.getpid(), cores) == []


def test_the_last_words_of_a_system_are_short(tmp_path: Path) -> None:
    log = tmp_path / "0.log"
    log.write_text("\n".join(f"line {index}" for index in range(100)))
    assert last_words(log).startswith("line 94 / line 95")
    assert "line 99" in str(SystemFailed(last_words(log)))
