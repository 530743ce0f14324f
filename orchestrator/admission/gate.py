"""The gate before the front door: who is asking, may they, how much, and by when.

Without a file of API keys everybody may ask for everything, and the body's `user` is the tenant that takes turns.
With one, a request is its key's: the key's name is the tenant, whatever `user` says, since anybody can write that.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Final

from disaggregated.errors import InvalidApiKey, InvalidRequest, NotAllowed, UnknownModel
from orchestrator.admission.api_keys import ApiKey
from orchestrator.admission.key_file import KeyFile
from orchestrator.admission.quotas import Quotas
from orchestrator.admission.ticket import ANONYMOUS, NO_OBJECTIVES, Objectives, Settle, Ticket

OPEN_PATHS: Final = frozenset({"/", "/health", "/version", "/metrics", "/prometheus/metrics", "/openapi.json"})
"""Probes, scrapers and readers of the API's description have no key."""
OPERATORS_PATHS: Final = ("/cluster", "/ledger", "/requests")
"""These and all below them tell of other people's requests, or change the deployment."""
TENANT_CHARACTERS_MAX: Final = 128
_HEADERS: Final = ("x-api-key", "api-key")
"""Other clients' spellings of `Authorization: Bearer`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request; `key` is None where there are no keys."""

    key: ApiKey | None = None

    def tenant(self, user: str | None) -> str:
        return self.key.name if self.key is not None else (user or "")[:TENANT_CHARACTERS_MAX]

    def may_use(self, *names: str) -> bool:
        """names: all that one model is called."""
        return self.key is None or self.key.models is None or not self.key.models.isdisjoint(names)


ANYBODY: Final = Caller()


@dataclasses.dataclass(slots=True, eq=False)
class Visit:
    """An HTTP request that was let in, and counted; nothing of it changes."""

    gate: Gate
    caller: Caller
    tenant: str
    objectives: Objectives

    def timeout_s(self, longest_s: float) -> float:
        """From arrival to last token; `longest_s` is what the deployment allows."""
        return min(longest_s, self.objectives.timeout_s or longest_s)

    def ticket(self) -> Ticket:
        return self.gate.ticket(self)

    def headers(self) -> dict[str, str]:
        return self.gate.headers(self.caller)


class Gate:
    def __init__(self, keys: KeyFile | None, quotas: Quotas) -> None:
        """keys: None when the deployment has no key file."""
        self._keys = keys
        self._quotas = quotas
        self._of_nobody = Visit(self, ANYBODY, "", NO_OBJECTIVES)
        """Most visits, where there are no keys: nothing is known of them."""

    @property
    def problem(self) -> str:
        """What is wrong with the key file as it is now; "" when nothing is."""
        return self._keys.problem if self._keys is not None else ""

    def let_in(self, path: str, headers: Mapping[str, str]) -> Caller:
        """
        Raises:
            InvalidApiKey: there is none, or it is not one of ours.
            NotAllowed: the key is good, but not for this path.
        """
        if self._keys is None:
            return ANYBODY
        self._keys.look()
        if path in OPEN_PATHS:
            return ANYBODY
        key = self._keys.ring.find(_presented(headers))
        if key is None:
            raise InvalidApiKey("the API key is not known here", param="authorization")
        if not key.operator and _is_operators(path):
            raise NotAllowed(f"{path[:200]!r} needs the key of an operator", param="authorization")
        return Caller(key)

    def check_model(self, caller: Caller, asked: str, *names: str) -> None:
        """names: all that the served model is called. The answer is the same as for a model that does not exist."""
        if not caller.may_use(*names):
            raise UnknownModel(f"the model {asked!r} does not exist, or is not for this key", param="model")

    def visit(self, caller: Caller, headers: Mapping[str, str], *, user: object, priority: int) -> Visit:
        """One HTTP request to generate; `user` is the body's field, and counts where it is text.

        Raises:
            InvalidRequest: a header, or a priority that is too good for this key.
            QuotaExceeded: the key's requests of this minute are used up.
        """
        objectives = Objectives.read(headers)
        if caller is ANYBODY and not user and objectives is NO_OBJECTIVES:
            return self._of_nobody
        if caller.key is not None:
            if priority < (best := caller.key.best_priority):
                raise InvalidRequest(f"priority must be at least {best} for this key, is {priority}", param="priority")
            self._quotas.take(caller.key, "requests", 1)
        return Visit(self, caller, caller.tenant(user if isinstance(user, str) else None), objectives)

    def ticket(self, visit: Visit) -> Ticket:
        """Good for any number of sequences of this request."""
        key = visit.caller.key
        if key is None and not visit.tenant and visit.objectives is NO_OBJECTIVES:
            return ANONYMOUS
        if key is None:
            return Ticket(tenant=visit.tenant, objectives=visit.objectives)
        charge = functools.partial(self._charge, key)
        return Ticket(tenant=visit.tenant, weight=key.weight, objectives=visit.objectives, charge=charge)

    def _charge(self, key: ApiKey, num_tokens: int) -> Settle:
        self._quotas.take(key, "tokens", num_tokens)
        return lambda took: self._quotas.settle(key, "tokens", took - num_tokens)

    def headers(self, caller: Caller) -> dict[str, str]:
        """What the client has left, in OpenAI's headers."""
        if caller.key is None:
            return {}
        headers: dict[str, str] = {}
        for each in self._quotas.remaining(caller.key):
            headers[f"x-ratelimit-limit-{each.what}"] = str(each.limit)
            headers[f"x-ratelimit-remaining-{each.what}"] = str(each.left)
            headers[f"x-ratelimit-reset-{each.what}"] = f"{each.full_in_s:.3f}s"
        return headers


def _presented(headers: Mapping[str, str]) -> str:
    """The key that the client sent. Raises InvalidApiKey when it sent none."""
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and credentials.strip():
        return credentials.strip()
    for name in _HEADERS:
        if found := headers.get(name):
            return found
    raise InvalidApiKey("there is no API key; send it as `Authorization: Bearer KEY`", param="authorization")


def _is_operators(path: str) -> bool:
    return any(path == each or path.startswith((f"{each}/", f"{each}_")) for each in OPERATORS_PATHS)
