"""What the front door is told about who may come in: keys, limits, TLS, and how many processes answer."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DoorConfig:
    num_workers: int = 1
    """Orchestrator processes that share the port."""
    body_bytes_max: int = 8 << 20
    """Of one request; a prompt of a million token ids takes seven million."""
    prompt_tokens_max: int = 0
    """Of one prompt; 0: as many as the model and its servers take."""
    tenant_queue_depth_max: int = 0
    """Requests of one tenant that wait for a dispatch; 0: as many as there is room for."""
    responses_bytes_max: int = 64 << 20
    """Of the responses that `previous_response_id` may refer to, in each worker; 0: none is kept."""
    api_keys_file: str = ""
    """Path; "": everybody may ask for everything."""
    cert_file: str = ""
    """PEM certificate, and those between it and its authority; "": plain HTTP."""
    key_file: str = ""
    """PEM private key of `cert_file`."""
