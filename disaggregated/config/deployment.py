"""What one `disaggregated -c disagg-config.yml` is told: the front door, and a pool of servers for each role.

Key names are TensorRT-LLM's where it has one. `load.py` makes these from a file and checks every value once; whoever
reads them afterwards may rely on the bounds that the field docs name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from disaggregated.config.door import DoorConfig
from disaggregated.config.security import SecurityConfig
from disaggregated.config.server import ServerConfig


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    type: str = "least_ttft"
    """How a server of the pool is chosen; `router_keys.py` names them all."""
    args: Mapping[str, object] = dataclasses.field(default_factory=dict)
    """The router's other keys by their names, checked."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig:
    num_instances: int = 1
    """Servers at start; at least 0 for context, at least 1 for generation. Equals `len(urls)` when there are urls."""
    urls: tuple[str, ...] = ()
    """Addresses, "host:port", of servers that somebody else runs; empty: local processes are started here."""
    router: RouterConfig = RouterConfig()
    server: ServerConfig
    """What each local process of this pool is told. `model` is "" where only running servers know it."""
    spread_threads: bool = True
    """The file names no `num_threads` and no `cpu_affinity`: the launcher deals the machine's cores out."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentConfig:
    hostname: str = "localhost"
    port: int = 8000
    """0: any free one; the ready line tells which."""
    model: str | None = None
    """None only when every server has a url: the model is then what they say they serve."""
    context: PoolConfig
    generation: PoolConfig
    max_retries: int = 1
    """Dispatches after the first one that a request may use up before it has emitted a token."""
    request_timeout_s: float = 180.0
    """From arrival to last token, queueing included."""
    server_start_timeout_s: float = 180.0
    """From starting a local server, or first calling a running one, to its being ready."""
    server_hung_timeout_s: float = 60.0
    """A local server that says nothing for so long is killed and starts again; 0: never."""
    progress_timeout_s: float = 1.0
    """A server with work that reports no step for so long is taken as lost."""
    queue_depth_max: int = 1024
    """Requests waiting for a dispatch; one more is refused with 429."""
    max_local_prefill_length: int = 0
    """Prompts with at most so many uncached tokens are prefilled on the generation server; 0: none."""
    balance_prefill: bool = False
    """Prompts are also prefilled on a generation server where that is estimated to cost less than the best pair."""
    session_sources: tuple[str, ...] = ("conversation_id", "header", "user")
    """What names the conversation of a request, the first that it has."""
    subagent_header: str = ""
    """Lower or upper case. A request with it goes where that session is; "": there is none."""
    subagent_scope: str = "context"
    """ "context" or "both": the hops for which it does."""
    tool_parser: str = "auto"
    """Of `parser_names.py`."""
    reasoning_parser: str = "auto"
    """Of `parser_names.py`."""
    allow_request_chat_template: bool = False
    """Whether a request's `chat_template` is run."""
    perf_metrics_max_requests: int = 1000
    """Finished requests whose story is kept for `GET /requests/{id}`; 0: none."""
    schedule_style: str = "context_first"
    """"context_first" or "generation_first"; both mean the same here: the two halves are called at once."""
    node_id: int = 0
    """0 to 255; part of the ids this orchestrator gives out."""
    log_level: str = "info"
    metrics_log_interval_s: float = 0.0
    """A line of totals in the log so often; 0: never."""
    door: DoorConfig = DoorConfig()
    security: SecurityConfig = SecurityConfig()
    notes: tuple[str, ...] = ()
    """One line for each key that was taken but has no effect, or another one than its name says."""
    not_built: tuple[str, ...] = ()
    """One line for each thing the file asks for that does not exist yet. A file with any loads, but does not start."""

    @property
    def routes_by_session(self) -> bool:
        """Somebody wants to know which conversation a request belongs to."""
        return "conversation" in (self.context.router.type, self.generation.router.type)
