"""What a destination can read with. The one that is configured by name is made at once: what it loads, and whom it has
to find, is no request's to wait for. Others are made when the first source needs them. All are kept."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from disaggregated.errors import TransferError
from kvtransfer import registry
from kvtransfer.negotiate import Preference, why_not
from kvtransfer.transport import DestinationTransport, OurEnd


class OurTransports:
    """Thread-safe."""

    def __init__(self, us: OurEnd, preference: Preference, *, given: Sequence[DestinationTransport] = ()) -> None:
        """`given` ones replace those of the registry.

        Raises ConfigError when `preference` cannot be honoured, TransferError when its transport cannot be made.
        """
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
        if preference.backend in self.names:
            try:
                self.get(preference.backend)
            except TransferError:
                if not preference.fallback:  # Else every source that is connected to says why another way was taken.
                    raise

    def get(self, name: str) -> DestinationTransport:
        """Raises TransferError when it cannot be made."""
        assert name in self.names, f"{name} is not one of {self.names}"
        with self._lock:
            if name not in self._made:
                self._made[name] = registry.load(name).make_transport(self.us)
            return self._made[name]
