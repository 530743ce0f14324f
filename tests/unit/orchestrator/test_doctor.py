"""What `disaggregated doctor` says of a transport, for each thing that it may find."""

from __future__ import annotations

import importlib.util
import os
import shutil

import pytest
from click.testing import CliRunner

from kvtransfer import probe, registry
from kvtransfer.probe import Probe
from kvtransfer.registry import TRANSPORTS
from kvtransfer.transports import cuda_runtime
from orchestrator.cli import disaggregated
from orchestrator.doctor import Verdict, device_copies, findings, transport


def test_a_transport_that_works_tells_its_speed_and_how_it_carries() -> None:
    found = transport("TCP", measure=lambda name: Probe(transport=name, gb_per_s=2.34, latency_us=81.6))
    assert found.verdict is Verdict.FINE
    assert found.says.startswith("2.3 GB/s between two processes here, 64 KiB in 82 µs; sockets")


def test_a_transport_that_fails_is_broken_and_says_how() -> None:
    found = transport("SHM", measure=lambda name: Probe(transport=name, failure="PeerLost: it hung up"))
    assert found.verdict is Verdict.BROKEN
    assert found.says == "does not work here: PeerLost: it hung up"


def test_a_transport_without_its_package_says_what_to_install_and_is_not_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, "missing", lambda name: "needs the ucxx package: pip install 'disaggregated[ucx]'")

    def never(name: str) -> Probe:
        raise AssertionError(f"{name} was measured")

    found = transport("TCP", measure=never)
    assert found.verdict is Verdict.KNOW
    assert found.says.startswith("needs the ucxx package: pip install 'disaggregated[ucx]'. It would be sockets")


def test_what_to_install_is_printed_as_pip_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = {"UCX": "needs the ucxx package: pip install 'disaggregated[ucx]'"}
    monkeypatch.setattr(registry, "missing", missing.get)
    said = CliRunner().invoke(disaggregated, ["doctor", "--no-measure"]).output
    assert "pip install 'disaggregated[ucx]'." in " ".join(said.split())


def test_there_is_a_line_for_every_transport() -> None:
    about = [finding.about for finding in findings(with_measurements=False)]
    assert [name for name in about if name.startswith("transport ")] == [
        f"transport {name}" for name in ("SHM", "NIXL", "UCX", "NCCL", "MPI", "TCP") if name in TRANSPORTS
    ]
    assert about[-1] == "backend: DEFAULT"


@pytest.mark.parametrize(("cores", "verdict"), [({0}, Verdict.KNOW), ({0, 1}, Verdict.FINE)])
def test_one_core_is_worth_a_word(cores: set[int], verdict: Verdict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cores)
    (found,) = (finding for finding in findings(with_measurements=False) if finding.about == "cores")
    assert found.verdict is verdict


def test_a_machine_without_a_compiler_is_told_what_that_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    (found,) = (finding for finding in findings(with_measurements=False) if finding.about == "C compiler")
    assert found.verdict is Verdict.KNOW
    assert "apt-get install gcc" in found.says


@pytest.mark.parametrize(("failure", "code"), [("", 0), ("PeerLost: it hung up", 1)])
def test_the_command_fails_when_something_is_broken(failure: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        probe, "measure", lambda name: Probe(transport=name, gb_per_s=1.0, latency_us=1.0, failure=failure)
    )
    result = CliRunner().invoke(disaggregated, ["doctor"])
    assert result.exit_code == code, result.output
    assert ("!!" in result.output) == bool(failure)
    assert "transport SHM" in result.output


@pytest.mark.parametrize(
    ("has_device", "lacking", "expected"),
    [
        (False, None, "no GPU"),
        (
            True,
            "needs the cuda-bindings package",
            "needs the cuda-bindings package. Until then blocks travel by pinned",
        ),
        (True, None, "copies from pool to pool"),
    ],
)
def test_whether_blocks_go_from_device_to_device_is_told(
    has_device: bool, lacking: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_runtime, "missing", lambda: lacking)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    found = device_copies(has_device=has_device)
    assert (found.about, expected in found.says) == ("CUDA IPC", True)
