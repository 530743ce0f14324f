"""The keys of a deployment file that say who may come in at the front door, and how much."""

from __future__ import annotations

from typing import Final

from disaggregated.config.key_table import Alias, Key, honoured
from disaggregated.config.kinds import TEXT, integer

WORKERS_MAX: Final = 64

DOOR: Final[tuple[Key, ...]] = (
    honoured(
        "num_workers",
        integer(1, WORKERS_MAX),
        "Orchestrator processes that share the port; each knows the load of all from the servers' heartbeats.",
        target="door.num_workers",
    ),
    honoured(
        "body_bytes_max",
        integer(1024, 1 << 30),
        "Bytes of one request's body; more is refused with 413.",
        target="door.body_bytes_max",
    ),
    honoured(
        "prompt_tokens_max",
        integer(0),
        "Tokens of one prompt; 0: as many as the model and its servers take.",
        target="door.prompt_tokens_max",
    ),
    honoured(
        "tenant_queue_depth_max",
        integer(0),
        "Waiting requests of one tenant (API key, or the body's `user`); 0: as many as there is room for.",
        target="door.tenant_queue_depth_max",
    ),
    honoured(
        "responses_bytes_max",
        integer(0, 1 << 40),
        "Bytes of answers to /v1/responses that a worker keeps for `previous_response_id`; 0: none.",
        target="door.responses_bytes_max",
    ),
    honoured(
        "api_keys_file",
        TEXT,
        "File with API keys, their quotas and models; read anew when it changes. Left out: nobody needs a key.",
        target="door.api_keys_file",
    ),
    honoured(
        "http_tls_cert_file",
        TEXT,
        "PEM certificate of the front door; with it HTTP is HTTPS. Read anew when it changes.",
        target="door.cert_file",
    ),
    honoured("http_tls_key_file", TEXT, "PEM private key of http_tls_cert_file.", target="door.key_file"),
)

ALIASES: Final[tuple[Alias, ...]] = (
    Alias(name="ssl_certfile", of="http_tls_cert_file"),
    Alias(name="ssl_keyfile", of="http_tls_key_file"),
)
