"""The model of all fake servers: the next token is a hash of the sequence so far, so tokens are an oracle."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Final

import numpy as np

from disaggregated import token_logprobs
from disaggregated.sampling_params import SamplingParams
from disaggregated.token_logprobs import TokenLogprob
from disaggregated.v1 import control_pb2

VOCAB_SIZE: Final = 250


def next_token(sequence: Sequence[int], seed: int = 0) -> int:
    return zlib.crc32(np.asarray(sequence, dtype=np.uint32).tobytes(), seed & 0xFFFFFFFF) % VOCAB_SIZE


def finish_reason_of(token: int, num_generated: int, sampling: SamplingParams) -> str:
    """Of the sequence that just got `token` as its `num_generated`-th one."""
    if token in sampling.stop_token_ids and num_generated > sampling.min_tokens:
        return "stop"
    return "length" if num_generated >= sampling.max_tokens else ""


def logprobs_of(tokens: Sequence[int], sampling: SamplingParams) -> control_pb2.Logprobs | None:
    """Numbers that say which token they are of."""
    if sampling.logprobs is None:
        return None
    return token_logprobs.to_proto(
        [
            TokenLogprob(-token / 64, token, (token,) * sampling.logprobs, (-0.5,) * sampling.logprobs)
            for token in tokens
        ]
    )


def oracle(prompt: Sequence[int], sampling: SamplingParams) -> tuple[list[int], str]:
    """Tokens and finish reason of one undisturbed run."""
    sequence = list(prompt)
    while True:
        sequence.append(next_token(sequence, sampling.seed))
        reason = finish_reason_of(sequence[-1], len(sequence) - len(prompt), sampling)
        if reason:
            return sequence[len(prompt) :], reason
