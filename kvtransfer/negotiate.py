"""Which transport two ends use, and why. Decided by the destination, from the source's offers.

A backend that was configured by name is used or refused, never quietly replaced. DEFAULT takes the best that both ends
have, and so does a named one with `fallback: true` when it cannot be used.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Final

from disaggregated.errors import ConfigError, TransferError
from kvtransfer import registry
from kvtransfer.transport import Offer

DEFAULT: Final = "DEFAULT"
SHM: Final = "SHM"
BEST_FIRST: Final = ("SHM", "NIXL", "UCX", "NCCL", "MPI", "TCP")
"""DEFAULT's order: one memcpy before a network card before the kernel's sockets."""
_FABRIC: Final = ("NIXL", "UCX")
"""What a source offers unasked where there is a network card for it; without one, TCP beats both."""
_FABRIC_DEVICES: Final = "/sys/class/infiniband"


@dataclasses.dataclass(frozen=True, slots=True)
class Preference:
    """`cache_transceiver_config.backend` and `.fallback`, of one end."""

    backend: str = DEFAULT
    fallback: bool = False

    def check(self) -> str | None:
        """None when this process can honour it; with `fallback`, why it cannot.

        Raises ConfigError, in words, when it cannot and must.
        """
        if self.backend == DEFAULT:
            return None
        reason = why_not(self.backend)
        if reason is None or (self.fallback and self.backend in registry.TRANSPORTS):
            return reason
        hint = "; set cache_transceiver_config.fallback: true to let the next best be used"
        raise ConfigError(
            f"cache_transceiver_config.backend: {self.backend} {reason}"
            f"{hint if self.backend in registry.TRANSPORTS else ''}; available: {', '.join(available())}"
        )

    def order(self) -> tuple[str, ...]:
        """The transports that this end may use, best first."""
        if self.backend == DEFAULT:
            return tuple(name for name in BEST_FIRST if name in registry.TRANSPORTS)
        if not self.fallback:
            return (self.backend,)
        return (self.backend, *(name for name in BEST_FIRST if name in registry.TRANSPORTS and name != self.backend))

    def offered(self) -> tuple[str, ...]:
        """What a source listens on from its start; others it adds when a destination asks for one it may use."""
        unasked = ("SHM", *_fabric(), "TCP")
        if self.backend == DEFAULT:
            return unasked
        if not self.fallback:
            return (self.backend,)
        first = () if why_not(self.backend) else (self.backend,)
        return (*first, *(name for name in unasked if name != self.backend))

    def may_add(self, name: str) -> bool:
        """Whether a source may listen on `name`, too, because a destination has it."""
        return name in self.order() and why_not(name) is None


def why_not(name: str) -> str | None:
    """Why this process cannot use transport `name`, as the rest of a sentence; None when it can."""
    if name in registry.FOREIGN:
        return f"is not part of this product ({registry.FOREIGN[name]})"
    if name not in registry.TRANSPORTS:
        return "is not known"
    return registry.missing(name)


def available() -> tuple[str, ...]:
    """Every value of `cache_transceiver_config.backend` that this process can honour."""
    return (DEFAULT, *(name for name in BEST_FIRST if name in registry.TRANSPORTS and registry.missing(name) is None))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to try, and why it comes where it does."""

    offer: Offer
    why: str


def candidates(preference: Preference, offers: Sequence[Offer], *, our_host_key: str) -> tuple[Candidate, ...]:
    """The ways to try, best first; never empty.

    Raises TransferError when no offer can be used, naming the transports on both sides.
    """
    usable = []
    left_out = []
    for name in preference.order():
        offer = next((each for each in offers if each.name == name), None)
        if offer is None:
            if name in (preference.backend, SHM, "TCP"):  # Nobody wonders why a library he never heard of is not used.
                left_out.append(f"{name} is not offered by the source")
        elif name == SHM and (not our_host_key or offer.host_key != our_host_key):
            left_out.append("SHM needs both ends on one host")
        elif reason := why_not(name):
            left_out.append(f"{name} {reason}")
        else:
            why = "configured" if name == preference.backend else _why(name, left_out)
            usable.append(Candidate(offer=offer, why=why))
    if not usable:
        offered = ", ".join(offer.name for offer in offers) or "nothing"
        raise TransferError(f"backend {preference.backend}: {'; '.join(left_out)} (the source offers {offered})")
    return tuple(usable)


def _why(name: str, left_out: Sequence[str]) -> str:
    fastest = "both ends are on one host" if name == SHM else "the best that both ends have"
    return "; ".join([fastest, *left_out])


def _fabric() -> tuple[str, ...]:
    """The one library that drives this machine's network cards, if it has both: two do not share a process."""
    if not fabric_devices():
        return ()
    return tuple(name for name in _FABRIC if name in registry.TRANSPORTS and registry.missing(name) is None)[:1]


def fabric_devices() -> tuple[str, ...]:
    """RDMA devices of this machine, by name."""
    try:
        return tuple(sorted(os.listdir(_FABRIC_DEVICES)))
    except OSError:
        return ()
