"""Conditional disaggregation: which prompts may, or must, be prefilled on the generation server that decodes them."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LocalPrefill:
    """As `conditional_disagg_config` says."""

    num_uncached_max: int = 0
    """A prompt with at most so many tokens to compute there is prefilled there; 0: none."""
    balances: bool = False
    """Also any other one for which that is estimated to cost less than the best pair of servers."""

    @property
    def is_on(self) -> bool:
        return self.balances or self.num_uncached_max > 0

    def why(self, num_tokens: int, num_held: int) -> str:
        """In words, if of so many tokens there is little enough to compute where `num_held` are; "" if not."""
        if not self.num_uncached_max:
            return ""
        uncached = num_tokens - num_held
        return f"{uncached} uncached tokens" if uncached <= self.num_uncached_max else ""
