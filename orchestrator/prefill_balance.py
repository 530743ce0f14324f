"""Whether a prompt is better prefilled where it will decode, because the context servers are behind. Pure arithmetic.

All counts are tokens: servers of one deployment run the same engine, so that the seconds on either side are tokens over
one and the same speed, which cancels out. Prefilling the prompt takes

    there    what the least busy context server has still to prefill, and then this prompt
    here     what the generation server has itself still to prefill, and then this prompt: once for its own client, and
             once more for every sequence that decodes here meanwhile and is held up for as long

So an idle generation server helps with a burst of prompts, and one with a full batch does not: the price of one prompt
for eight running chats is eight prompts, and what a context server has to be behind by before that is worth it.
"""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.server import Server


def why_here(num_prompt_tokens: int, context: Sequence[Server], generation: Server) -> str:
    """The two sums in words if fewer tokens hold anybody up here; "" if not, or if there is no context server."""
    if not context:
        return ""
    there = min(server.num_prefill_tokens for server in context) + num_prompt_tokens
    here = generation.num_prefill_tokens + num_prompt_tokens * (1 + generation.num_decoding)
    return f"{here} tokens hold somebody up here, {there} at the context servers" if here < there else ""
