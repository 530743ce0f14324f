"""Whether an engine with given limits could ever serve a request: decided when it comes, before anything is held."""

from __future__ import annotations

from disaggregated.engine.api import EngineRequest
from disaggregated.engine.engine_limits import EngineLimits
from disaggregated.errors import InvalidRequest, PoolExhausted, PromptTooLong


def check_request(request: EngineRequest, limits: EngineLimits) -> None:
    """
    Raises:
        InvalidRequest, PromptTooLong: it can't be served by anyone with these limits.
        PoolExhausted: its prompt is larger than the pool.
    """
    num_tokens = len(request.token_ids)
    if num_tokens == 0:
        raise InvalidRequest("the prompt is empty", param="prompt")
    if request.sampling.max_tokens < 1:
        raise InvalidRequest(f"max_tokens is {request.sampling.max_tokens}, it must be at least 1", param="max_tokens")
    if num_tokens >= limits.max_seq_len:
        raise PromptTooLong(
            f"the prompt has {num_tokens} tokens; with one token after it, {limits.max_seq_len} is the limit",
            param="prompt",
        )
    num_wanted = limits.num_blocks_for(num_tokens)
    if num_wanted > limits.num_blocks:
        raise PoolExhausted(
            f"the prompt of {num_tokens} tokens wants {num_wanted} KV blocks, the whole pool has {limits.num_blocks}"
        )
    if not 0 <= min(request.token_ids) <= max(request.token_ids) < limits.vocab_size:
        raise InvalidRequest(f"a token id of the prompt is not between 0 and {limits.vocab_size - 1}", param="prompt")
    if max(request.sampling.logprob_token_ids, default=0) >= limits.vocab_size:
        raise InvalidRequest(
            f"logprob_token_ids: the model's logits end with token {limits.vocab_size - 1}", param="logprob_token_ids"
        )
    if (thinking := request.sampling.thinking) is not None and max(thinking.end) >= limits.vocab_size:
        raise InvalidRequest(
            f"the tag that ends reasoning has tokens above {limits.vocab_size - 1}, the last of the model's logits",
            param="thinking_token_budget",
        )
