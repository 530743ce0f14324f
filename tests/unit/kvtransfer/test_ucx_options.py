"""What UCX is told where its user says nothing, and that what the user says is left alone."""

from __future__ import annotations

from kvtransfer.transports.ucx_lane import _options


def test_ucx_opens_no_other_device_than_loopback_for_a_peer_on_this_machine() -> None:
    assert _options(True, {})["NET_DEVICES"] == "lo"


def test_a_peer_elsewhere_is_reached_over_whatever_devices_ucx_finds() -> None:
    assert "NET_DEVICES" not in _options(False, {})


def test_a_device_that_the_user_names_is_not_overruled() -> None:
    assert "NET_DEVICES" not in _options(True, {"UCX_NET_DEVICES": "mlx5_0:1"})


def test_tcp_segments_are_as_large_on_both_sides_because_ucx_refuses_to_receive_less_than_it_sends() -> None:
    options = _options(False, {})
    assert options["TCP_TX_SEG_SIZE"] == options["TCP_RX_SEG_SIZE"]


def test_one_segment_size_of_the_user_leaves_both_alone() -> None:
    for name in ("UCX_TCP_TX_SEG_SIZE", "UCX_TCP_RX_SEG_SIZE"):
        assert not any("SEG_SIZE" in key for key in _options(False, {name: "8k"}))
