"""The model of all fake servers: the next token is a hash of the sequence so far, so tokens are an oracle.

Where a prompt has a script (`script.py`), it says that instead.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Final

import numpy as np

from disaggregated import token_logprobs
from disaggregated.sampling_params import SamplingParams
from disaggregated.token_logprobs import TokenLogprob
from disaggregated.v1 import control_pb2
from tests.support.script import next_of_script

VOCAB_SIZE: Final = 250


def next_token(sequence: Sequence[int], seed: int = 0) -> int:
    if (scripted := next_of_script(sequence)) is not None:
        return scripted
    return zlib.crc32(np.asarray(sequence, dtype=np.uint32).tobytes(), seed & 0xFFFFFFFF) % VOCAB_SIZE


def finish_reason_of(token: int, num_generated: int, sampling: SamplingParams) -> str:
    """Of the sequence that just got `token` as its `num_generated`-th one."""
    if token in sampling.stop_token_ids and num_generated > sampling.min_tokens:
        return "stop"
    return "length" if num_generated >= sampling.max_tokens else ""


def logprobs_of(tokens: Sequence[int], sampling: SamplingParams) -> control_pb2.Logprobs | None:
    """Numbers that say which token they are of."""
    if sampling.logprobs is not None and sampling.logprob_token_ids:
        return token_logprobs.to_proto([told_of_asked(token, sampling.logprob_token_ids) for token in tokens])
    return _told_of(tokens, sampling.logprobs)


def prompt_logprobs_of(prompt: Sequence[int], sampling: SamplingParams) -> control_pb2.Logprobs | None:
    return _told_of(prompt[1:], sampling.prompt_logprobs)


def _told_of(tokens: Sequence[int], num_top: int | None) -> control_pb2.Logprobs | None:
    if num_top is None:
        return None
    return token_logprobs.to_proto([told_of(token, num_top) for token in tokens])


def told_of(token: int, num_top: int) -> TokenLogprob:
    """The token is the first of its `num_top` likeliest, or stands behind all of them; sixteenths travel unchanged."""
    first = token + token % 2
    ids = tuple((first + index) % VOCAB_SIZE for index in range(num_top))
    rank = ids.index(token) + 1 if token in ids else num_top + 1
    return TokenLogprob(-token / 16 - rank, rank, ids, tuple(-token / 16 - 1.0 - index for index in range(num_top)))


def told_of_asked(token: int, asked: Sequence[int]) -> TokenLogprob:
    """`asked` by their ids, each as likely as its id says."""
    one = told_of(token, 0)
    return TokenLogprob(one.logprob, one.rank, tuple(asked), tuple(-other / 16 for other in asked))


def oracle(prompt: Sequence[int], sampling: SamplingParams) -> tuple[list[int], str]:
    """Tokens and finish reason of one undisturbed run."""
    sequence = list(prompt)
    while True:
        sequence.append(next_token(sequence, sampling.seed))
        reason = finish_reason_of(sequence[-1], len(sequence) - len(prompt), sampling)
        if reason:
            return sequence[len(prompt) :], reason
