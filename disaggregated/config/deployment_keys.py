"""The keys of a `disagg-config.yml` besides the engine arguments: at the top level, and of a section of servers."""

from __future__ import annotations

from typing import Final

from disaggregated.config import door_keys, router_keys, security_keys
from disaggregated.config.key_table import Alias, KeyTable, honoured, no_effect, not_built
from disaggregated.config.kinds import ADDRESSES, ANYTHING, BOOLEAN, TEXT, choice, integer, number
from disaggregated.config.server_cli import LOG_LEVEL
from disaggregated.config.server_keys import SERVER_KEYS
from disaggregated.config.text_keys import TEXT_KEYS

_NO_DISCOVERY: Final = "servers do not register themselves; name them in urls, or leave the key out to start them here"
_NO_COORDINATOR: Final = "orchestrators need none: each knows the load of all from the servers' heartbeats"
_STORIES: Final = "GET /requests/{id} tells each request's story"

TOP_KEYS: Final = KeyTable(
    [
        honoured("hostname", TEXT, "Address the orchestrator listens on."),
        honoured("port", integer(0, 65535), "Port the orchestrator listens on; 0: any free one, named when ready."),
        honoured(
            "max_retries",
            integer(0),
            "Servers lost in a row, without a new token, before a request fails; 8 at least.",
        ),
        honoured("perf_metrics_max_requests", integer(0), "Finished requests whose story is kept; 0: none."),
        honoured(
            "conditional_disagg_config.max_local_prefill_length",
            integer(0),
            "Prompts with at most so many uncached tokens are prefilled on the generation server.",
            target="max_local_prefill_length",
        ),
        honoured(
            "conditional_disagg_config.balance_prefill",
            BOOLEAN,
            "Also those that are estimated to cost less there than with the best pair of servers.",
            target="balance_prefill",
        ),
        honoured(
            "schedule_style",
            choice("context_first", "generation_first"),
            "Both mean the same here: the two halves of a request are called at once.",
        ),
        honoured("node_id", integer(0, 255), "Part of the ids this orchestrator gives out."),
        honoured("request_timeout_s", number(0.001), "From a request's arrival to its last token, queueing included."),
        honoured("server_start_timeout_s", number(0.001), "How long a server may take to be ready."),
        honoured(
            "server_hung_timeout_s",
            number(0),
            "A server that was started here and says nothing for so long is killed and started again; 0: never.",
        ),
        honoured("progress_timeout_s", number(0.001), "A server with work that reports no step for so long is lost."),
        honoured("queue_depth_max", integer(1), "Requests waiting for a dispatch; one more is refused with 429."),
        honoured("log_level", LOG_LEVEL, "Of the orchestrator and of the servers it starts."),
        honoured("metrics_log_interval_s", number(0), "A line of totals in the log so often; 0: never."),
        *security_keys.DEPLOYMENT,
        no_effect("return_perf_metrics", BOOLEAN, f"statistics are always on: {_STORIES}"),
        no_effect("perf_metrics_output_dir", TEXT, f"nothing is written: {_STORIES}"),
        no_effect("otlp_config", ANYTHING, f"traces are not exported: {_STORIES}"),
        no_effect("gen_strip_message_history", BOOLEAN, "servers never get messages, only token ids", harmless=(True,)),
        no_effect("gen_tokids_ctxbytes", BOOLEAN, "token ids always travel as bytes", harmless=(True,)),
        not_built("disagg_cluster.cluster_uri", TEXT, _NO_DISCOVERY),
        no_effect("disagg_cluster.cluster_name", TEXT, "see disagg_cluster.cluster_uri"),
        no_effect("disagg_cluster.heartbeat_interval_sec", number(0), "see disagg_cluster.cluster_uri"),
        no_effect("disagg_cluster.inactive_timeout_sec", number(0), "see disagg_cluster.cluster_uri"),
        no_effect("disagg_cluster.minimal_instances.context_servers", integer(0), "see disagg_cluster.cluster_uri"),
        no_effect("disagg_cluster.minimal_instances.generation_servers", integer(0), "see disagg_cluster.cluster_uri"),
        *door_keys.DOOR,
        no_effect("disagg_coordinator_url", TEXT, _NO_COORDINATOR),
        *router_keys.SESSIONS,
        *TEXT_KEYS,
    ],
    door_keys.ALIASES,
)

SECTION_KEYS: Final = KeyTable(
    [
        honoured("num_instances", integer(0), "Servers at start; with urls, their number."),
        honoured("urls", ADDRESSES, "host:port of servers that run already; left out: local processes are started."),
        *router_keys.SECTION,
        *SERVER_KEYS,
    ],
    [*SERVER_KEYS.aliases, Alias(name="router.name", of="router.type")],
)
"""A section's own keys and the engine arguments; the latter may also stand at the top level, for both sections."""
