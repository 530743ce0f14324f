"""Servers as the orchestrator's books hold them, made without a connection."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from disaggregated.block_hash import BlockHash
from disaggregated.kv_layout import KVLayout
from disaggregated.v1 import control_pb2
from orchestrator.load import Share
from orchestrator.routing.known_blocks import KnownBlocks
from orchestrator.server import Role, Server

LAYOUT = KVLayout(num_layers=1, num_kv_heads=1, head_dim=8, block_size=16, dtype="float32", num_blocks=100)


class HoldsFirst(KnownBlocks):
    """Holds the first blocks of whatever is asked for."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.num_blocks = num_blocks

    def num_held(self, hashes: Sequence[BlockHash], num_max: int | None = None) -> int:
        return min(self.num_blocks, len(hashes))


@dataclasses.dataclass
class Seen:
    """A candidate that is nothing but what a policy sees of it."""

    instance_id: str
    num_requests: int
    num_tokens: int
    num_cached_blocks: int = 0
    block_size: int = 0
    names: tuple[str, ...] = ()

    @property
    def known_blocks(self) -> KnownBlocks:
        return HoldsFirst(self.num_cached_blocks)


class NoClient:
    """Routing never calls a server."""


def server(role: Role, name: str, *, heartbeat: dict[str, Any] | None = None, **description: Any) -> Server:
    """One that is ready, idle and empty."""
    made = Server(role, name)
    made.connected(
        NoClient(),  # type: ignore[arg-type]
        control_pb2.ServerDescription(
            **{
                "instance_id": name, "role": role.value, "epoch": 1, "can_prefill": True, "max_batch_size": 4,
                "max_num_tokens": 64, "max_seq_len": 1000, "layout": LAYOUT.to_proto(), **description,
            }
        ),
    )  # fmt: skip
    told = {"epoch": 1, "num_blocks": 100, "num_blocks_free": 100, **(heartbeat or {})}
    made.heard(control_pb2.Heartbeat(**told), now_s=0.0)
    made.ready()
    return made


def context(name: str = "c0", **told: Any) -> Server:
    return server(Role.CONTEXT, name, **told)


def generation(name: str = "g0", **told: Any) -> Server:
    return server(Role.GENERATION, name, **told)


def share(
    *, num_tokens: int = 10, num_prefill_tokens: int = 0, num_blocks: int = 1, is_decoding: bool = False
) -> Share:
    return Share(num_tokens, num_prefill_tokens, num_blocks, on_lost=lambda _: None, is_decoding=is_decoding)


def holds(one: Server, hashes: Sequence[BlockHash]) -> None:
    """Its stream of blocks says that these can be found there, and no others."""
    added = [control_pb2.BlockEvent(block_hash=each.to_bytes(16, "big")) for each in hashes]
    one.known_blocks.clear()
    assert one.known_blocks.apply(control_pb2.BlockEvents(cleared=True, events=added))
