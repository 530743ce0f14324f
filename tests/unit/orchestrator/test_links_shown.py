"""Which way KV really goes, and how fast: in the metrics, in the cluster's description, in `disaggregated status`."""

from __future__ import annotations

from disaggregated.v1 import control_pb2
from orchestrator.api.operations import describe_worker
from orchestrator.metrics import link_families
from orchestrator.remote_control import link_line
from orchestrator.server import Role
from tests.unit.orchestrator.routing.servers import server

LINK = control_pb2.LinkStatistics(
    peer_id="context-1-ab",
    transport="TCP",
    why="the best that both ends have; SHM failed: the source runs as another user",
    fallbacks=1,
    devices="cpu -> cuda:0",
    bytes_total=3 << 20,
    seconds_total=0.5,
    transfers_total=7,
    failures_total=2,
    recent_bytes_per_s=2.5e9,
)


def test_each_link_is_a_row_of_the_metrics_with_both_devices() -> None:
    generation = server(Role.GENERATION, "generation-1")
    generation.heard(control_pb2.Heartbeat(epoch=1, links=[LINK]), now_s=0.0)
    samples = {
        sample.name: (sample.labels, sample.value)
        for family in link_families([generation])
        for sample in family.samples
    }
    labels, rate = samples["disagg_link_bytes_per_second"]
    assert rate == 2.5e9
    assert labels["peer"] == "context-1-ab"
    assert (labels["transport"], labels["devices"]) == ("TCP", "cpu -> cuda:0")
    values = {name: value for name, (_, value) in samples.items()}
    assert values["disagg_link_bytes_total"] == 3 << 20
    assert values["disagg_link_fallbacks_total"] == 1
    assert values["disagg_link_failures_total"] == 2


def test_a_reader_of_the_status_sees_the_transport_the_speed_and_why_it_is_not_a_better_one() -> None:
    generation = server(Role.GENERATION, "generation-1")
    generation.heard(control_pb2.Heartbeat(epoch=1, links=[LINK]), now_s=0.0)
    worker = describe_worker(generation)
    (link,) = worker["links"]
    line = link_line(worker, link)
    assert line == (
        f"KV context-1-ab -> {generation.instance_id}  TCP (cpu -> cuda:0): 7 transfers, 3.0 MiB, 2.5 GB/s, 2 failed; "
        "the best that both ends have; SHM failed: the source runs as another user"
    )


def test_a_link_that_has_moved_nothing_yet_claims_no_speed() -> None:
    worker = {"worker_id": "generation-1"}
    link = {"peer": "c", "transport": "SHM", "devices": "cpu -> cpu", "why": "configured", "transfers": 0}
    assert link_line(worker, {**link, "failures": 0, "bytes": 0, "bytes_per_s": 0.0}).endswith(
        "0 transfers, 0.0 MiB; configured"
    )
