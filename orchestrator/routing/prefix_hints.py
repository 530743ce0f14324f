"""Who has the beginning of a prompt: which generation server a context server may bring it from. Pure.

The blocks of a chat's earlier turns, the answers among them, lie where they were decoded. The context server that gets
the next turn may be another one than before, may have evicted them, and never had the answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from disaggregated.block_hash import BlockHash
from disaggregated.v1 import control_pb2
from orchestrator.server import Server


def prefix_hint(
    hashes: Sequence[BlockHash], context: Server, generation: Iterable[Server]
) -> control_pb2.PrefixHint | None:
    """The generation server that holds more of these blocks than `context`, and more than the others.

    hashes: made with `context`'s own block size. Of equals the first one; None when nobody holds more.
    """
    if not hashes:
        return None
    block_size = context.block_size
    most, holder = context.known_blocks.num_held(hashes), None
    for server in generation:
        if server.block_size != block_size:
            continue  # The hash of a block depends on where blocks end.
        num_held = server.known_blocks.num_held(hashes)
        if num_held > most:
            most, holder = num_held, server
    if holder is None:
        return None
    return control_pb2.PrefixHint(
        address=holder.address,
        instance_id=holder.description.instance_id,
        epoch=holder.description.epoch,
        num_tokens=most * block_size,
    )
