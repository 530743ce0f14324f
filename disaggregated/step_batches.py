"""How a decode step's news of many sequences are packed into one message, and taken out of it.

Most of them are one token and nothing else. Those stand in columns: a message for each would cost more to take apart
than everything else that an orchestrator does with a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from disaggregated.errors import ServerLost
from disaggregated.v1 import control_pb2

_PLAIN_FIELDS: Final = ("stream_key", "first_position", "token_ids")


def packed(step: int, deltas: Iterable[control_pb2.StreamDelta]) -> control_pb2.StepBatch:
    batch = control_pb2.StepBatch(step=step)
    stream_keys, positions, token_ids, others = [], [], [], []
    for delta in deltas:
        if len(delta.token_ids) == 1 and _is_plain(delta):
            stream_keys.append(delta.stream_key)
            positions.append(delta.first_position)
            token_ids.append(delta.token_ids[0])
        else:
            others.append(delta)
    batch.stream_keys.extend(stream_keys)
    batch.positions.extend(positions)
    batch.token_ids.extend(token_ids)
    batch.deltas.extend(others)
    return batch


def _is_plain(delta: control_pb2.StreamDelta) -> bool:
    """Whatever fields a delta may have in later versions: none of them is set."""
    return all(field.name in _PLAIN_FIELDS for field, _ in delta.ListFields())


def columns_of(batch: control_pb2.StepBatch) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """Stream keys, positions and tokens of the plain deltas.

    Raises:
        ServerLost: they differ in length; nothing that their sender says can be trusted any more.
    """
    stream_keys, positions, token_ids = batch.stream_keys[:], batch.positions[:], batch.token_ids[:]
    if not len(stream_keys) == len(positions) == len(token_ids):
        raise ServerLost("the columns of a step's message differ in length")
    return stream_keys, positions, token_ids


def deltas_of(batch: control_pb2.StepBatch) -> Iterator[control_pb2.StreamDelta]:
    """All of them, for those whom it does not matter what they cost."""
    for stream_key, position, token_id in zip(*columns_of(batch), strict=True):
        yield control_pb2.StreamDelta(stream_key=stream_key, first_position=position, token_ids=[token_id])
    yield from batch.deltas
