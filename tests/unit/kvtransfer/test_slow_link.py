import socket
import threading

import pytest

from tests.support.slow_link import SlowLink, TokenBucket


@pytest.mark.parametrize("piece", [10, 100, 1000])
def test_what_goes_on_is_the_burst_and_then_the_rate(piece: int) -> None:
    bucket, now_s, sent = TokenBucket(1000.0, 100), 50.0, 0
    while sent < 10_000:
        now_s += bucket.wait_s(piece, now_s=now_s)
        sent += piece
    assert now_s - 50.0 == pytest.approx((10_000 - 100) / 1000.0)


def test_after_a_pause_no_more_than_the_burst_goes_at_once() -> None:
    bucket = TokenBucket(1000.0, 100)
    assert bucket.wait_s(100, now_s=0.0) == pytest.approx(0.0)
    assert bucket.wait_s(100, now_s=1000.0) == pytest.approx(0.0, abs=1e-9)
    assert bucket.wait_s(100, now_s=1000.0) == pytest.approx(0.1)


def test_without_a_rate_nothing_waits() -> None:
    assert TokenBucket(0.0, 1).wait_s(1 << 40, now_s=0.0) == 0.0


def test_bytes_arrive_as_they_were_both_ways() -> None:
    with socket.create_server(("127.0.0.1", 0)) as target:
        link = SlowLink("127.0.0.1", target.getsockname()[1], 0.0)
        serving = threading.Thread(target=link.serve)
        serving.start()
        with socket.create_connection(("127.0.0.1", link.port)) as near:
            far, _ = target.accept()
            for one, other in ((near, far), (far, near)):
                one.sendall(b"x" * 200_000)
                received = b""
                while len(received) < 200_000:
                    received += other.recv(1 << 20)
                assert received == b"x" * 200_000
            far.close()
            assert not near.recv(1)
        link.close()
        serving.join(20)
