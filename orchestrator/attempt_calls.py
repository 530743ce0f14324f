"""What an attempt asks of its two servers, as messages."""

from __future__ import annotations

from typing import NamedTuple

from disaggregated.v1 import control_pb2
from orchestrator.request_run import RequestRun
from orchestrator.server import Server


class AttemptCalls(NamedTuple):
    """What both messages have in common; nothing of it changes."""

    run: RequestRun
    wire_id: str
    """Unlike the client's own id, never used twice: an attempt must not meet the remains of an earlier one."""
    sampling: control_pb2.SamplingParams
    deadline_s: float
    """From now."""

    def prefill(self, *, has_reader: bool, reuse_from: control_pb2.PrefixHint | None) -> control_pb2.PrefillRequest:
        """has_reader: a generation server is going to pull the blocks."""
        request = self.run.request
        return control_pb2.PrefillRequest(
            request_id=self.wire_id,
            transfer_id=self.wire_id if has_reader else "",
            token_ids=self.run.token_ids,
            sampling=self.sampling,
            deadline_s=self.deadline_s,
            priority=request.priority,
            cache_salt=request.cache_salt,
            reuse_from=reuse_from,
        )

    def admit(self, *, link_id: str, stream_key: int, source: Server | None) -> control_pb2.AdmitRequest:
        """source: who prefills it; None: the generation server does."""
        request = self.run.request
        return control_pb2.AdmitRequest(
            orchestrator_id=link_id,
            stream_key=stream_key,
            request_id=self.wire_id,
            token_ids=self.run.token_ids,
            sampling=self.sampling,
            deadline_s=self.deadline_s,
            source=None if source is None else _ticket(source, self.wire_id),
            priority=request.priority,
            cache_salt=request.cache_salt,
        )


def _ticket(source: Server, transfer_id: str) -> control_pb2.TransferTicket:
    description = source.description
    return control_pb2.TransferTicket(
        address=source.address,
        instance_id=description.instance_id,
        epoch=description.epoch,
        transfer_id=transfer_id,
    )
