"""`disaggregated doctor`: what this machine has, what each transport does between two processes here, what to install.

Every line is a finding: fine, worth knowing, or broken; with what to do where there is something to do.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib.util
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from typing import Final

import psutil
from rich.console import Console
from rich.table import Table
from rich.text import Text

from disaggregated import __version__
from disaggregated.security.status import secret_status
from kvtransfer import negotiate, probe, registry
from kvtransfer.transports import cuda_runtime

_DRIVER: Final = "/dev/nvidiactl"
_MEMORY_WISHED: Final = 4 << 30


class Verdict(enum.StrEnum):
    FINE = "ok"
    KNOW = "--"
    BROKEN = "!!"


_COLORS: Final = {Verdict.FINE: "green", Verdict.KNOW: "yellow", Verdict.BROKEN: "red"}


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    verdict: Verdict
    about: str
    says: str


def findings(*, with_measurements: bool) -> Iterator[Finding]:
    """One after the other, so that slow ones can be waited for line by line."""
    yield Finding(
        Verdict.FINE, "disaggregated", f"{__version__} on Python {platform.python_version()}, {platform.platform()}"
    )
    yield _cores()
    yield _memory()
    yield _compiler()
    yield _cuda()
    yield device_copies(has_device=os.path.exists(_DRIVER))
    yield _network_cards()
    yield _secret()
    for name in negotiate.BEST_FIRST:
        if name in registry.TRANSPORTS:
            yield transport(name, measure=probe.measure if with_measurements else None)
    offered = ", ".join(negotiate.Preference().offered())
    yield Finding(Verdict.FINE, "backend: DEFAULT", f"offers {offered} here, and takes the first that both ends have")


def doctor(*, with_measurements: bool) -> bool:
    """Prints every finding as it is made; False when one of them is broken."""
    console = Console(highlight=False)
    is_well = True
    for finding in findings(with_measurements=with_measurements):
        line = Table.grid(padding=(0, 1))
        line.add_column(width=2)
        line.add_column(width=16, no_wrap=True)
        line.add_column()
        verdict = Text(finding.verdict, style=_COLORS[finding.verdict])
        line.add_row(verdict, finding.about, Text(finding.says))  # Text: an extra's brackets are no markup.
        console.print(line)
        is_well = is_well and finding.verdict is not Verdict.BROKEN
    return is_well


def transport(name: str, *, measure: Callable[[str], probe.Probe] | None) -> Finding:
    """Whether it can be used by a server here; with `measure`, whether it really moves bytes, and how fast."""
    listed = registry.TRANSPORTS[name]
    about = f"transport {name}"
    reason = registry.missing(name)
    if reason is not None and not (name == "MPI" and "mpirun" in reason):  # The probe launches its own MPI world.
        return Finding(Verdict.KNOW, about, f"{reason}. It would be {listed.carries}")
    if measure is None:
        return Finding(Verdict.FINE, about, listed.carries)
    found = measure(name)
    if found.failure:
        return Finding(Verdict.BROKEN, about, f"does not work here: {found.failure}")
    speed = f"{found.gb_per_s:.1f} GB/s between two processes here, 64 KiB in {found.latency_us:.0f} µs"
    return Finding(Verdict.FINE, about, f"{speed}; {listed.carries}" + (f"; {reason}" if reason else ""))


def _cores() -> Finding:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if usable < 2:
        return Finding(
            Verdict.KNOW, "cores", "1: context and generation server take turns on it; two show what splitting is for"
        )
    return Finding(Verdict.FINE, "cores", f"{usable} usable; each server takes its own, see cores in docs/config.md")


def _memory() -> Finding:
    free = psutil.virtual_memory().available
    verdict = Verdict.FINE if free >= _MEMORY_WISHED else Verdict.KNOW
    hint = (
        ""
        if verdict is Verdict.FINE
        else "; the quick start wants 4 GiB: set kv_cache_config.cpu_memory_budget_bytes lower"
    )
    return Finding(verdict, "memory", f"{free / 2**30:.1f} GiB available{hint}")


def _compiler() -> Finding:
    found = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if found is None:
        return Finding(
            Verdict.KNOW,
            "C compiler",
            "none: kernels run in torch, several times slower on CPU; apt-get install gcc libc6-dev",
        )
    return Finding(Verdict.FINE, "C compiler", f"{found}: CPU kernels are built for this machine at first use")


def _cuda() -> Finding:
    if not os.path.exists(_DRIVER):
        return Finding(Verdict.KNOW, "GPU", "none that a driver shows; everything runs on CPU")
    has_triton = importlib.util.find_spec("triton") is not None
    return Finding(
        Verdict.FINE if has_triton else Verdict.KNOW,
        "GPU",
        "a driver is here" + ("" if has_triton else "; the triton package is not, so kernels are torch's"),
    )


def device_copies(*, has_device: bool) -> Finding:
    """Whether SHM goes from pool to pool on a GPU, or by way of host memory."""
    reason = cuda_runtime.missing()
    if reason is None and importlib.util.find_spec("triton") is None:
        reason = "needs the triton package: pip install 'disaggregated[cuda]'"
    if not has_device:
        return Finding(Verdict.KNOW, "CUDA IPC", "no GPU; with one, SHM copies from pool to pool of a device")
    if reason is not None:
        return Finding(Verdict.KNOW, "CUDA IPC", f"{reason}. Until then blocks travel by pinned host memory")
    return Finding(Verdict.FINE, "CUDA IPC", "SHM between servers of this host copies from pool to pool of a device")


def _secret() -> Finding:
    status = secret_status()
    verdict = Verdict.BROKEN if not status.is_usable else Verdict.FINE if status.is_set else Verdict.KNOW
    return Finding(verdict, "cluster secret", status.says)


def _network_cards() -> Finding:
    devices = negotiate.fabric_devices()
    if not devices:
        return Finding(
            Verdict.KNOW, "RDMA", "no device in /sys/class/infiniband; between hosts, TCP is the fastest here"
        )
    return Finding(
        Verdict.FINE, "RDMA", f"{', '.join(devices)}: install disaggregated[nixl] or disaggregated[ucx] to use it"
    )
