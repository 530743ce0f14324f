"""The keys of a server section that say who is computed when, and of speculative decoding. Part of `server_keys.py`.

None of them changes a token of the output.
"""

from __future__ import annotations

from typing import Final

from disaggregated.config.key_table import Alias, Key, honoured, no_effect
from disaggregated.config.kinds import ANYTHING, BOOLEAN, choice, integer

_WITH_DRAFT_MODEL: Final = (
    *("Draft_Target", "Eagle", "Eagle3", "MTP", "Medusa", "Lookahead", "PARD", "SA", "DFlash", "DSpark"),
    *("SaveState", "User_Provided"),
)
_NGRAM: Final = ("NGram", "drafts come from the text so far, without another model; NGram is used: the same tokens")
_ANY_TIME: Final = "a sequence starts when its prompt has room, and is preempted and continued when blocks run out"
_MEASURED: Final = "how long drafts are follows from what they bring and cost, measured while serving"
_OWN_TEXT: Final = "drafts come from the sequence's own text, all of it"
_NO_DRAFT_MODEL: Final = "no second model is loaded"

HONOURED: Final = (
    honoured(
        "disable_overlap_scheduler",
        BOOLEAN,
        "Launch a step only when the tokens of the one before are known. On cuda, without speculative_config, the next "
        "step is otherwise launched before; on CPU there is nothing to overlap.",
    ),
    honoured(
        "scheduler_config.max_prefill_tokens_beside_decode",
        integer(1),
        "Tokens of prompts in a step in which somebody decodes: bounds how much a prompt delays running streams. Left "
        "out: a quarter of max_num_tokens.",
    ),
    honoured(
        "speculative_config.decoding_type",
        choice("none", "NGram", "AUTO", *_WITH_DRAFT_MODEL, words="NGram or none"),
        "NGram: what followed the last tokens before is computed along with the next one, as a guess.",
        substitutes=dict.fromkeys(("AUTO", *_WITH_DRAFT_MODEL), _NGRAM),
    ),
    honoured(
        "speculative_config.max_draft_len",
        integer(1),
        "Most tokens guessed at once; fewer where they are seldom right.",
    ),
    honoured(
        "speculative_config.max_matching_ngram_size",
        integer(1),
        "Most tokens at the end of the text that are looked for in the text before; 2 at least, unless this is 1.",
    ),
    honoured(
        "speculative_config.is_use_oldest", BOOLEAN, "Take the earliest place where they occur, not the latest one."
    ),
    honoured(
        "speculative_config.max_concurrency", integer(1), "No guesses in a step with more decoding sequences than that."
    ),
)

NO_EFFECT: Final = (
    no_effect("enable_overlap_scheduler", BOOLEAN, "set disable_overlap_scheduler instead", harmless=(True,)),
    no_effect(
        "scheduler_config.capacity_scheduler_policy",
        choice("MAX_UTILIZATION", "GUARANTEED_NO_EVICT", "STATIC_BATCH"),
        _ANY_TIME,
        harmless=("MAX_UTILIZATION",),
    ),
    no_effect(
        "scheduler_config.context_chunking_policy",
        choice("FIRST_COME_FIRST_SERVED", "EQUAL_PROGRESS", "FORCE_CHUNK"),
        "prompts are computed one after the other, by priority and arrival",
        harmless=("FIRST_COME_FIRST_SERVED",),
    ),
    no_effect(
        "scheduler_config.waiting_queue_policy",
        choice("fcfs", "priority"),
        "by priority, then first come, first served: without priorities the two are one",
        harmless=("fcfs", "priority"),
    ),
    no_effect("scheduler_config.dynamic_batch_config", ANYTHING, "limits are those of the configuration"),
    *(
        no_effect(f"speculative_config.{name}", ANYTHING, _OWN_TEXT)
        for name in ("is_keep_all", "is_public_pool", "max_ngram_size", "max_verification_set_size", "max_window_size")
    ),
    *(
        no_effect(f"speculative_config.{name}", ANYTHING, _NO_DRAFT_MODEL)
        for name in (
            *("speculative_model", "speculative_model_dir", "num_nextn_predict_layers", "eagle3_one_model"),
            *("eagle3_layers_to_capture", "use_relaxed_acceptance_for_thinking", "relaxed_topk", "relaxed_delta"),
            *("num_eagle_layers", "max_non_leaves_per_layer", "mtp_eagle_one_model", "use_mtp_vanilla"),
        )
    ),
    *(
        no_effect(f"speculative_config.{name}", ANYTHING, _MEASURED)
        for name in ("draft_len_schedule", "acceptance_window", "acceptance_length_threshold", "max_total_draft_tokens")
    ),
)

ALIASES: Final = (
    Alias(
        name="speculative_config.prompt_lookup_num_tokens",
        of="speculative_config.max_draft_len",
        says="old name, taken as max_draft_len",
    ),
)

KEYS: Final[tuple[Key, ...]] = (*HONOURED, *NO_EFFECT)
