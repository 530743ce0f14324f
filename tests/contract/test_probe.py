"""The probe that `disaggregated doctor` runs: two processes, real bytes, and a sentence for whatever goes wrong."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from kvtransfer import probe, registry
from kvtransfer.registry import TRANSPORTS
from kvtransfer.transports import mpirun


def is_here(name: str) -> bool:
    """The probe launches an MPI world of its own."""
    if name == "MPI":
        return mpirun.path() is not None and importlib.util.find_spec("mpi4py") is not None
    return registry.missing(name) is None


@pytest.mark.parametrize("name", [name for name in TRANSPORTS if is_here(name)])
def test_every_transport_that_is_here_moves_bytes_between_two_processes(name: str) -> None:
    found = probe.measure(name, timeout_s=200)
    assert found.failure == ""
    assert found.transport == name
    assert found.gb_per_s > 0
    assert found.latency_us > 0


def test_a_transport_that_cannot_be_made_is_a_sentence_and_not_a_traceback() -> None:
    found = probe.measure("NOSUCH")
    assert found.failure == "KeyError: 'NOSUCH'"


def test_a_source_that_fails_is_told_by_the_other_end(tmp_path: Path) -> None:
    (tmp_path / "offer").write_text(json.dumps({"failure": "TransferError: no device"}))
    assert probe._read("TCP", tmp_path).failure == "the source: TransferError: no device"


def test_a_probe_that_takes_too_long_is_ended() -> None:
    found = probe.measure("TCP", timeout_s=0.01)
    assert found.failure == "nothing within 0.01 s"
