"""What generate() returns. Names are those of vLLM and TensorRT-LLM, so that code written for them reads on."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Logprob:
    """How likely one token was in its place, by the model's own logits."""

    logprob: float
    """Natural logarithm."""
    rank: int | None
    """1: no token was likelier. None: it was asked for by its id, and its rank is not known."""
    decoded_token: str


Logprobs = dict[int, Logprob]
"""By token id: the token itself, and as many of the likeliest as were asked for."""


@dataclasses.dataclass(slots=True, kw_only=True)
class CompletionOutput:
    """One sequence generated for a prompt, whole or as far as it is."""

    index: int
    """Of the `n` sequences of its prompt."""
    text: str = ""
    """Without special tokens and without the stop string that ended it."""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    """All that were sampled, the stopping one included."""
    finish_reason: str | None = None
    """"stop" or "length"; None while it goes on."""
    stop_reason: str | int | None = None
    """What stopped it: the stop string, or the id of `stop_token_ids`; None for the model's own end of text."""
    logprobs: list[Logprobs] | None = None
    """One for each of `token_ids`, where they were asked for."""
    cumulative_logprob: float | None = None
    """Their sum."""


@dataclasses.dataclass(slots=True, kw_only=True)
class RequestOutput:
    """Everything about one prompt."""

    request_id: str
    prompt: str | None
    """None when the prompt came as token ids."""
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0
    """Of the prompt, found in the prefix cache when its first sequence started."""
    prompt_logprobs: list[Logprobs | None] | None = None
    """One for each of `prompt_token_ids`, where they were asked for; None for the first, which nothing comes before."""

    @property
    def finished(self) -> bool:
        return all(output.finish_reason is not None for output in self.outputs)

    def copy(self) -> RequestOutput:
        """As it is now; what is generated from here on does not show in it."""
        outputs = [
            dataclasses.replace(
                output,
                token_ids=list(output.token_ids),
                logprobs=None if output.logprobs is None else list(output.logprobs),
            )
            for output in self.outputs
        ]
        return dataclasses.replace(self, outputs=outputs)
