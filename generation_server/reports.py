"""What a generation server says of its transfers in its ledger and its metrics."""

from __future__ import annotations

from disaggregated.engine.serving.live_requests import request_id_of
from disaggregated.v1 import control_pb2
from generation_server.admission import Admission
from kvtransfer import PeerStatistics


def link(peer: PeerStatistics) -> control_pb2.LinkStatistics:
    return control_pb2.LinkStatistics(
        peer_id=peer.peer_id,
        transport=peer.transport,
        bytes_total=peer.bytes_total,
        seconds_total=peer.seconds_total,
        transfers_total=peer.transfers_total,
        failures_total=peer.failures_total,
        why=peer.why,
        fallbacks=peer.fallbacks,
        devices=peer.devices,
        recent_bytes_per_s=peer.recent_bytes_per_s,
    )


def landing(admission: Admission, block_size: int) -> control_pb2.LedgerEntry:
    """A request whose blocks a transfer may still write into."""
    return control_pb2.LedgerEntry(
        kind="transfer",
        owner=request_id_of(admission.engine_id),
        count=-(-admission.num_prompt_tokens // block_size),
        age_s=admission.age_s,
    )
