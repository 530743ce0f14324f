"""How good the router's predictions were: counted for each attempt that brought a first token."""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry

from orchestrator.counting import Counter, Histogram
from orchestrator.story import AttemptStory

_RATIOS: Final = (0.25, 0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0)


def cached_verdict(attempt: AttemptStory) -> str:
    """What the server found of the prompt, beside what it was known to hold; "" where one of the two is not known.

    What was brought there for this prompt is neither.
    """
    predicted = attempt.decision.num_cached_tokens
    if predicted is None or attempt.first_token_s is None:
        return ""
    found = attempt.num_cached_tokens - attempt.num_pulled_tokens
    return "exact" if found == predicted else "more" if found > predicted else "fewer"


class Scorecard:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._cached = Counter(
            "disagg_cached_tokens_predicted_total",
            "Prompts whose server found exactly the cached tokens that were predicted, or more, or fewer.",
            ["verdict"],
            registry=registry,
        )
        self._ratio = Histogram(
            "disagg_ttft_estimate_ratio",
            "Dispatch to first token, over what was estimated.",
            buckets=_RATIOS,
            registry=registry,
        )

    def observe(self, attempt: AttemptStory) -> None:
        if verdict := cached_verdict(attempt):
            self._cached.labels(verdict).inc()
        estimated_s = attempt.decision.ttft_s
        if estimated_s and attempt.first_token_s is not None:
            self._ratio.observe((attempt.first_token_s - attempt.began_s) / estimated_s)
