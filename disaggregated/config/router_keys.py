"""The `router:` keys of a section of servers, and those that say which requests are of one conversation."""

from __future__ import annotations

from typing import Final

from disaggregated.config.key_table import Key, honoured, no_effect
from disaggregated.config.kinds import (
    ANYTHING,
    BOOLEAN,
    TEXT,
    WEIGHTS,
    choice,
    choices,
    integer,
    number,
)

ROUTERS: Final = (
    "least_ttft",
    "round_robin",
    "load_balancing",
    "power_of_two",
    "kv_cache_aware",
    "conversation",
    "weighted",
)
SESSION_SOURCES: Final = ("conversation_id", "header", "user", "client_address", "forwarded_for")
_OUR_TOKENS: Final = "prompts are tokenized here once, with the model's own tokenizer"

SECTION: Final[tuple[Key, ...]] = (
    honoured(
        "router.type",
        choice(*ROUTERS),
        "How a server of the section is chosen; least_ttft by what each pair of servers would cost.",
    ),
    honoured(
        "router.use_tokens",
        BOOLEAN,
        "load_balancing, power_of_two and kv_cache_aware count tokens, not requests; default false.",
    ),
    honoured("router.max_batch_size", integer(1), "kv_cache_aware: so many requests weigh as much as a cached prompt."),
    honoured("router.max_num_tokens", integer(1), "The same in tokens, with use_tokens; default 8192."),
    honoured(
        "router.match_threshold",
        number(0, 1),
        "conversation: the share of a prompt that must have been sent there before; default 0.75.",
    ),
    honoured(
        "router.hash_skip_count",
        integer(0),
        "conversation: tokens at the beginning of prompts that tell nothing, since all share them; default 0.",
    ),
    honoured("router.max_sessions", integer(1), "conversation: sessions remembered; default 100000."),
    honoured("router.session_ttl_s", number(1), "conversation: a session is forgotten after so long; default 3600."),
    honoured(
        "router.weights",
        WEIGHTS,
        "weighted: shares of the traffic, by address, instance or version; '*' is all servers that no other name fits.",
    ),
    no_effect("router.tokens_per_block", ANYTHING, "blocks are as large as the servers say: kv_cache_config"),
    no_effect("router.custom_tokenizer", ANYTHING, _OUR_TOKENS),
    no_effect("router.use_token_ids", ANYTHING, _OUR_TOKENS, harmless=(True,)),
    no_effect(
        "router.backfill_block_hashes_on_finish",
        ANYTHING,
        "both kinds of servers tell of every block as it comes and goes",
        harmless=(False,),
    ),
)

SESSIONS: Final[tuple[Key, ...]] = (
    honoured(
        "session_sources",
        choices(*SESSION_SOURCES),
        "What names a conversation, the first that a request has: conversation_id in its body, a header, its user, "
        "where it comes from, or where a proxy says that it comes from.",
    ),
    honoured(
        "conversation_affinity_header_for_subagents",
        TEXT,
        "A header with the session of the agent on whose behalf a request comes; it goes where that session is.",
        target="subagent_header",
    ),
    honoured(
        "subagent_affinity_scope",
        choice("context", "both"),
        "Which hop that header decides: the context server's alone, or both.",
        target="subagent_scope",
    ),
)
