"""Whether a server that reports for duty serves the same thing as those who are there already. Pure.

Whoever is ready first sets the terms. A server that disagrees is refused in words and tried again later: blocks of
other weights, or of another shape, must never be attended to.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from disaggregated.kv_layout import KVLayout
from disaggregated.kv_shard import KVHolding
from disaggregated.v1 import control_pb2
from orchestrator.server import Server


class ServedModelNames(Protocol):
    """The part of a ServedModel that matters here."""

    @property
    def name(self) -> str: ...

    def is_meant_by(self, name: str) -> bool: ...


def disagreement(
    server: Server,
    description: control_pb2.ServerDescription,
    others: Iterable[Server],
    *,
    model: ServedModelNames | None,
) -> str | None:
    """In words, why `server`, which describes itself so, cannot join; None when it can."""
    if description.role != server.role:
        return f"{server.address} is a {description.role} server, and was named as a {server.role} server"
    if model is not None and not (model.is_meant_by(description.model) or is_same_model(description.model, model.name)):
        return f"{server.address} serves {description.model!r}, and this deployment serves {model.name!r}"
    for other in others:
        if other is not server and (reason := _between(description, other)) is not None:
            return f"{server.address}: {reason} ({other.role} server {other.instance_id})"
    return None


def is_same_model(one: str, other: str) -> bool:
    """The same full name, or the same basename: servers of other machines may keep the files somewhere else."""
    return one.rstrip("/").rpartition("/")[2] == other.rstrip("/").rpartition("/")[2]


def _between(ours: control_pb2.ServerDescription, other: Server) -> str | None:
    theirs = other.description
    if ours.instance_id == theirs.instance_id:
        return f"instance id {ours.instance_id!r} is taken by the server at {other.address}"
    if not is_same_model(ours.model, theirs.model):
        return f"model is {ours.model!r} here and {theirs.model!r} there"
    if ours.fingerprint != theirs.fingerprint:
        return f"weights or numerics differ: fingerprint {ours.fingerprint} here and {theirs.fingerprint} there"
    if difference := _layout_difference(ours, theirs):
        return f"KV layouts differ: {difference}"
    return None


def _layout_difference(ours: control_pb2.ServerDescription, theirs: control_pb2.ServerDescription) -> str | None:
    """Between roles, blocks of another size or dtype are converted on their way.

    Servers of one role store them alike, so that a request's tokens do not depend on where it was dispatched.
    """
    here, there = KVLayout.from_proto(ours.layout), KVLayout.from_proto(theirs.layout)
    if ours.role == theirs.role:
        return here.difference(there)
    return KVHolding.whole(here).model_shape.difference(KVHolding.whole(there).model_shape)
