"""Who else answers at this port: nobody, or the other workers of this deployment on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from orchestrator.response_store import StoredResponse


class Siblings(Protocol):
    async def metrics(self, own: bytes) -> bytes:
        """Prometheus' text of all, given one's own."""

    async def story(self, request_id: str) -> bytes | None:
        """JSON, from whoever has it; None: none of the others."""

    async def response(self, response_id: str, *, tenant: str, forget: bool = False) -> StoredResponse | None:
        """The tenant's, from whoever keeps it; None: none of the others. With `forget` it is not kept any longer."""

    async def counts(self, own: Mapping[str, int]) -> dict[str, Any]:
        """The sums over all, and under "workers" each one's."""


class Alone:
    """There is one worker."""

    async def metrics(self, own: bytes) -> bytes:
        return own

    async def story(self, request_id: str) -> bytes | None:
        return None

    async def response(self, response_id: str, *, tenant: str, forget: bool = False) -> StoredResponse | None:
        return None

    async def counts(self, own: Mapping[str, int]) -> dict[str, Any]:
        return dict(own)
