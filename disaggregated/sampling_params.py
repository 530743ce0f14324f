"""How the next token is chosen. Everything a server needs to continue a sequence that another server began."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from disaggregated.errors import InvalidRequest
from disaggregated.peer_input import checked_number
from disaggregated.v1 import control_pb2

STOP_TOKEN_IDS_MAX: Final = 4096
"""More than any model has, and a client may add."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Checked by the orchestrator, in the client's words; a server looks once more at what comes to it.

    The random number for the token at position `p` of a sequence (prompt included) depends on `(seed, p)` alone,
    so a sequence gives the same tokens wherever it is continued.
    """

    max_tokens: int
    """Tokens that may still be generated, at least 1."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    seed: int = 0
    """0 to 2**64 - 1."""
    stop_token_ids: frozenset[int] = frozenset()
    """EOS and the client's own. The one that is sampled is reported and ends the sequence."""
    min_tokens: int = 0
    """Stop tokens are not sampled before that many tokens."""

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    def after(self, num_tokens: int) -> SamplingParams:
        """What is left to do once `num_tokens` have been generated elsewhere."""
        return dataclasses.replace(
            self, max_tokens=self.max_tokens - num_tokens, min_tokens=max(0, self.min_tokens - num_tokens)
        )

    def to_proto(self) -> control_pb2.SamplingParams:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return control_pb2.SamplingParams(**{**fields, "stop_token_ids": sorted(self.stop_token_ids)})

    @classmethod
    def from_proto(cls, message: control_pb2.SamplingParams) -> SamplingParams:
        """Raises InvalidRequest for values that no orchestrator of ours sends."""
        _check(message)
        fields = {field.name: getattr(message, field.name) for field in dataclasses.fields(cls)}
        return cls(**{**fields, "stop_token_ids": frozenset(message.stop_token_ids)})


def _check(message: control_pb2.SamplingParams) -> None:
    checked_number(message.temperature, "temperature", low=0.0)
    checked_number(message.top_p, "top_p", low=0.0, high=1.0)
    checked_number(message.min_p, "min_p", low=0.0, high=1.0)
    if len(message.stop_token_ids) > STOP_TOKEN_IDS_MAX:
        raise InvalidRequest(
            f"there are {len(message.stop_token_ids)} stop_token_ids, {STOP_TOKEN_IDS_MAX} are allowed",
            param="stop_token_ids",
        )


def over_model_defaults(
    defaults: Mapping[str, float],
    *,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    min_p: float | None,
) -> dict[str, Any]:
    """The four fields of SamplingParams that a model has defaults for: what is None here is the model's, and where it
    has none the whole distribution at temperature 1. A `top_k` below 0 is off, as 0 is."""
    top_p = defaults.get("top_p", 1.0) if top_p is None else top_p
    top_k = int(defaults.get("top_k", 0)) if top_k is None else max(0, top_k)
    if top_p == 0.0:
        top_p, top_k = 1.0, 1  # the smallest nucleus there is: the likeliest token alone
    return {
        "temperature": defaults.get("temperature", 1.0) if temperature is None else temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": defaults.get("min_p", 0.0) if min_p is None else min_p,
    }
