"""Which transport two ends use, and why. Decided by the destination, from the source's offers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Final

from disaggregated.errors import ConfigError, TransferError
from kvtransfer.transport import Offer
from kvtransfer.transports import shm, tcp

DEFAULT: Final = "DEFAULT"
BEST_FIRST: Final = (shm.NAME, tcp.NAME)
"""What is built, in DEFAULT's order of preference: one memcpy before two trips through the kernel."""
NOT_BUILT: Final[Mapping[str, str]] = {
    "UCX": "it needs the ucxx package",
    "NIXL": "it needs the nixl-cu12 package",
    "MOONCAKE": "it needs the mooncake-transfer-engine package",
    "MPI": "it needs both servers in one MPI world",
    "NCCL": "it needs a CUDA device on both ends",
}
"""Names that configuration files carry and this version does not have, with what each would take."""


def check_backend(name: str) -> None:
    """Raises ConfigError, in words, unless `cache_transceiver_config.backend: name` can be honoured."""
    if name == DEFAULT or name in BEST_FIRST:
        return
    available = ", ".join((DEFAULT, *BEST_FIRST))
    reason = f"is not part of this version ({NOT_BUILT[name]})" if name in NOT_BUILT else "is not known"
    raise ConfigError(f"cache_transceiver_config.backend: {name} {reason}; available: {available}")


def speakable(backend: str) -> tuple[str, ...]:
    """The transports that a destination configured so may use, best first."""
    return BEST_FIRST if backend == DEFAULT else (backend,)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to try, and why it comes where it does."""

    offer: Offer
    why: str


def candidates(backend: str, offers: Sequence[Offer], *, our_host_key: str) -> tuple[Candidate, ...]:
    """The ways to try, best first; never empty.

    Raises TransferError when no offer can be used, naming the transports on both sides.
    """
    usable = []
    left_out = []
    for name in speakable(backend):
        offer = next((each for each in offers if each.name == name), None)
        if offer is None:
            left_out.append(f"{name} is not offered by the source")
        elif name == shm.NAME and (not our_host_key or offer.host_key != our_host_key):
            left_out.append("SHM needs both ends on one host")
        else:
            why = "configured" if backend != DEFAULT else _why(name, left_out)
            usable.append(Candidate(offer=offer, why=why))
    if not usable:
        offered = ", ".join(offer.name for offer in offers) or "nothing"
        raise TransferError(f"backend {backend}: {'; '.join(left_out)} (the source offers {offered})")
    return tuple(usable)


def _why(name: str, left_out: Sequence[str]) -> str:
    fastest = "both ends are on one host" if name == shm.NAME else "the best that both ends have"
    return "; ".join([fastest, *left_out])
