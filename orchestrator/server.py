"""What the orchestrator knows about one server. Books only: who is there, what runs where, is there room. No I/O.

CONNECTING ──▶ READY ──▶ DRAINING
    ▲  │         │          │
    │  ▼         ▼          ▼
  REFUSED       LOST  ◀──────          LOST and REFUSED are tried again from CONNECTING
"""

from __future__ import annotations

import dataclasses
import enum
from typing import TYPE_CHECKING, Final

from disaggregated.compute_cost import num_pairs
from disaggregated.errors import ServerLost
from disaggregated.kv_layout import KVLayout
from disaggregated.v1 import control_pb2
from orchestrator.load import Load, Share
from orchestrator.routing.known_blocks import KnownBlocks
from orchestrator.routing.speed import PoolSpeed, ServerSpeed

if TYPE_CHECKING:
    from orchestrator.generation_link import GenerationLink
    from orchestrator.server_client import ServerClient
    from orchestrator.transfer_aborts import TransferAborts


NOT_REACHED: Final = "not reached yet"
STEPS_AHEAD: Final = 2
"""Of prefill, on a context server: one under way and one more ready. The rest waits where it can still go elsewhere."""


class Role(enum.StrEnum):
    CONTEXT = "context"
    GENERATION = "generation"


class Standing(enum.StrEnum):
    CONNECTING = "connecting"
    READY = "ready"
    DRAINING = "draining"
    LOST = "lost"
    REFUSED = "refused"
    """It answers, but serves something else than the others do."""


_READY: Final = Standing.READY
_CONTEXT: Final = Role.CONTEXT
"""Members of an enum are looked up slowly, and these are for each request and each server."""


@dataclasses.dataclass(frozen=True, slots=True)
class Elsewhere:
    """What other orchestrators have on a server: what it tells of itself, less what is ours.

    A heartbeat is older than what we know, so what has just come or gone looks like somebody else's for a moment. Only
    what two heartbeats in a row tell is believed.
    """

    num_requests: int = 0
    num_prefill_tokens: int = 0
    _seen: tuple[int, int] = (0, 0)

    def heard(self, heartbeat: control_pb2.Heartbeat, *, num_requests: int, num_prefill_tokens: int) -> Elsewhere:
        """num_requests, num_prefill_tokens: ours, now."""
        seen = (
            max(0, heartbeat.num_running + heartbeat.num_waiting - num_requests),
            max(0, heartbeat.num_waiting_tokens - num_prefill_tokens),
        )
        return Elsewhere(min(seen[0], self._seen[0]), min(seen[1], self._seen[1]), seen)


class Server:
    """Invariant: `shares` holds exactly the attempts that run here; none outlives the connection it was made on.
    `num_requests` is as many, and those elsewhere."""

    def __init__(self, role: Role, address: str, pool_speed: PoolSpeed | None = None) -> None:
        """pool_speed: shared by all servers of its pool."""
        self.role = role
        self.address = address
        self.standing = Standing.CONNECTING
        self.reason = NOT_REACHED
        """Why it is not ready, in words."""
        self.description = control_pb2.ServerDescription()
        self.heartbeat = control_pb2.Heartbeat()
        self.heard_s: float | None = None
        """When the last heartbeat of this connection came."""
        self.client: ServerClient | None = None
        self.link: GenerationLink | None = None
        self.aborts: TransferAborts | None = None
        self.known_blocks = KnownBlocks()
        """That it holds; empty where nobody follows them."""
        self.pulls_back = False
        """A context server that may bring a prompt's beginning from a generation server."""
        self._pool_speed = pool_speed or PoolSpeed()
        self.speed = ServerSpeed(self._pool_speed)
        self.instance_id = address
        """Its own name for itself, once it has told it. These are read for each request, and each server of it."""
        self.block_size = self.token_bytes = self.max_num_tokens = 0
        """In tokens; bytes of KV for one token; tokens of a step."""
        self.max_batch_size = 1
        self.can_prefill = False
        self.names: tuple[str, ...] = (address,)
        """What a weight may call it: its address, its instance, its version, its model."""
        self.unhealthy = ""
        """What it says is wrong with it, although it answers; "" while all is well."""
        self.elsewhere = Elsewhere()
        self.num_times_lost = 0
        self.load = Load()
        self.shares = self.load.shares
        self.num_requests = 0
        """Ours, and those that other orchestrators have there."""
        self._blocks_promised = 0
        self._is_held_back = False

    @property
    def is_ready(self) -> bool:
        """A link breaks a moment before everybody has heard that its server is lost."""
        return self.standing is _READY and (self.link is None or not self.link.is_broken)

    @property
    def layout(self) -> KVLayout:
        return KVLayout.from_proto(self.description.layout)

    @property
    def num_tokens_max(self) -> int:
        """The longest sequence that fits, prompt and generated tokens together."""
        layout = self.description.layout
        return min(self.description.max_seq_len, layout.num_blocks * layout.block_size)

    def connected(self, client: ServerClient, description: control_pb2.ServerDescription) -> None:
        self.standing, self.reason = Standing.CONNECTING, "waiting for its first heartbeat"
        self.client = client
        self.description = description
        self.instance_id = description.instance_id or self.address
        self.block_size = description.layout.block_size
        self.token_bytes = self.layout.token_bytes if description.HasField("layout") else 0
        self.max_num_tokens = description.max_num_tokens
        self.max_batch_size = max(1, description.max_batch_size)
        self.can_prefill = description.can_prefill
        self.names = (self.address, self.instance_id, description.version, description.model)

    def ready(self) -> None:
        self.standing, self.reason = Standing.READY, ""

    def refused(self, reason: str) -> None:
        self.standing, self.reason = Standing.REFUSED, reason

    def unreachable(self, reason: str) -> None:
        self.standing, self.reason = Standing.CONNECTING, reason
        self._disconnect()

    def _disconnect(self) -> None:
        self.client = self.link = self.aborts = self.heard_s = None
        self.heartbeat, self.unhealthy = control_pb2.Heartbeat(), ""
        self.speed, self.elsewhere = ServerSpeed(self._pool_speed), Elsewhere()
        self._count()
        self._blocks_promised, self._is_held_back = 0, False

    def lost(self, error: ServerLost) -> None:
        """Everybody who has something here is told, once; from now on nothing is sent here."""
        self.standing, self.reason = Standing.LOST, str(error)
        self.num_times_lost += 1
        self._disconnect()
        for share in list(self.shares.values()):
            share.on_lost(error)

    def heard(self, heartbeat: control_pb2.Heartbeat, *, now_s: float) -> None:
        self.heartbeat, self.heard_s, self.unhealthy = heartbeat, now_s, heartbeat.unhealthy
        self._blocks_promised, self._is_held_back = 0, False
        self.speed.heard(heartbeat, now_s=now_s)
        self.elsewhere = self.elsewhere.heard(
            heartbeat, num_requests=len(self.shares), num_prefill_tokens=self.load.num_prefill_tokens
        )
        self._count()
        if heartbeat.draining and self.is_ready:
            self.standing, self.reason = Standing.DRAINING, "draining"

    def take(self, key: int, share: Share) -> None:
        self.load.take(key, share)
        self._count()
        self._blocks_promised += share.num_blocks

    def give_back(self, key: int, *, makes_room: bool) -> None:
        self.load.give_back(key)
        self._count()
        if makes_room:
            self._is_held_back = False

    def _count(self) -> None:
        self.num_requests = len(self.shares) + self.elsewhere.num_requests

    def hold_back(self) -> None:
        """It refused a request, or a call to it failed; nothing more is tried before its next heartbeat, or before
        something else has ended there."""
        self._is_held_back = True

    def has_room(self, *, num_blocks: int, num_steps: int = STEPS_AHEAD) -> bool:
        """num_steps: of prefill, that a context server may have before it; what waits here can go nowhere else."""
        return self.is_ready and self.takes(num_blocks, num_steps)

    def takes(self, num_blocks: int, num_steps: int = STEPS_AHEAD) -> bool:
        """As `has_room`, of a server that is ready."""
        if self._is_held_back:
            return False
        if not self.shares:
            return True  # Of several orchestrators each may have one there, whatever the others have.
        if self.num_requests >= self.max_batch_size:
            return False
        if self.role is _CONTEXT and self.num_prefill_tokens >= num_steps * self.max_num_tokens:
            return False
        # As of the last heartbeat, less what was sent there since.
        return num_blocks <= max(0, self.heartbeat.num_blocks_free - self._blocks_promised)

    @property
    def num_tokens(self) -> int:
        """Of those requests: of their prompts, and generated. Of others' what is to be computed is known."""
        return self.load.num_tokens + self.elsewhere.num_prefill_tokens

    @property
    def num_prefill_tokens(self) -> int:
        """Of prompts that are to be computed there, whoever sent them."""
        return self.load.num_prefill_tokens + self.elsewhere.num_prefill_tokens

    @property
    def num_decoding(self) -> int:
        """Sequences whose next token a longer step would hold up."""
        return self.load.num_decoding + self.elsewhere.num_requests

    def prefill_backlog_s(self) -> float:
        """Until everything that is to be computed there now has been, if nothing else comes."""
        cost = self.speed.prompt
        seconds = self.elsewhere.num_prefill_tokens * cost.token_s
        if not self.load.num_prefill_tokens:
            return seconds
        chunk_size = self.max_num_tokens or 1
        for share in self.load.prefilling:  # As `StepCost.part_s` of the end of each.
            end, num_left = share.num_tokens, share.num_prefill_tokens
            seconds += cost.fixed_s * -(-num_left // chunk_size) + cost.token_s * num_left
            if cost.pair_s:
                seconds += cost.pair_s * num_pairs(end - num_left, end)
        return seconds
