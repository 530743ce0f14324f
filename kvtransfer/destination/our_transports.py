"""What a destination can read with. Each transport is made when the first source needs it, and kept."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from kvtransfer import registry
from kvtransfer.negotiate import Preference, why_not
from kvtransfer.transport import DestinationTransport, OurEnd


class OurTransports:
    """Thread-safe."""

    def __init__(self, us: OurEnd, preference: Preference, *, given: Sequence[DestinationTransport] = ()) -> None:
        """`given` ones replace those of the registry. Raises ConfigError when `preference` cannot be honoured."""
        preference.check()
        self.us = us
        self.preference = preference
        self._lock = threading.Lock()
        self._made = {each.name: each for each in given}
        order = preference.order()
        self.names: tuple[str, ...] = tuple(
            name for name in order if (name in self._made if given else why_not(name) is None)
        )
        """That this process can use, best first."""

    def get(self, name: str) -> DestinationTransport:
        """Raises TransferError when it cannot be made."""
        assert name in self.names, f"{name} is not one of {self.names}"
        with self._lock:
            if name not in self._made:
                self._made[name] = registry.load(name).make_transport(self.us)
            return self._made[name]
