"""Whether an engine with given limits could ever serve a request: decided when it comes, before anything is held."""

from __future__ import annotations

from disaggregated.engine.api import EngineRequest
from disaggregated.errors import InvalidRequest, PoolExhausted, PromptTooLong


def check_request(
    request: EngineRequest, *, max_seq_len: int, num_blocks: int, block_size: int, vocab_size: int
) -> None:
    """
    Raises:
        InvalidRequest, PromptTooLong: it can't be served by anyone with these limits.
        PoolExhausted: its prompt is larger than this pool of `num_blocks`.
    """
    num_tokens = len(request.token_ids)
    if num_tokens == 0:
        raise InvalidRequest("the prompt is empty", param="prompt")
    if request.sampling.max_tokens < 1:
        raise InvalidRequest(f"max_tokens is {request.sampling.max_tokens}, it must be at least 1", param="max_tokens")
    if num_tokens >= max_seq_len:
        raise PromptTooLong(
            f"the prompt has {num_tokens} tokens; with one token after it, {max_seq_len} is the limit", param="prompt"
        )
    num_wanted = -(-num_tokens // block_size)
    if num_wanted > num_blocks:
        raise PoolExhausted(
            f"the prompt of {num_tokens} tokens wants {num_wanted} KV blocks, the whole pool has {num_blocks}"
        )
    if not 0 <= min(request.token_ids) <= max(request.token_ids) < vocab_size:
        raise InvalidRequest(f"a token id of the prompt is not between 0 and {vocab_size - 1}", param="prompt")
