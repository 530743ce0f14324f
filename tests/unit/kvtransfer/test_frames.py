import random
import struct

import pytest

from disaggregated.errors import LeaseExpired, StaleEpoch, TransferError
from kvtransfer.runs import Run
from kvtransfer.transports import frames
from kvtransfer.transports.frames import HEADER, Hello, Kind, MalformedFrame, ReadRequest, Welcome

READ = ReadRequest(lease_key=b"k" * 16, epoch=2**63, layers=range(1, 3), blocks=(Run(3, 2), Run(0, 1)))


def body_of(frame: bytes) -> bytes:
    kind, length = frames.unpack_header(frame[: HEADER.size])
    assert length == len(frame) - HEADER.size, kind
    return frame[HEADER.size :]


def test_each_message_comes_back_as_it_was() -> None:
    assert frames.unpack_challenge(body_of(frames.pack_challenge(b"c" * 16))) == b"c" * 16
    hello = Hello(nonce=b"n" * 16, epoch=5, peer_id="génération-1", proof=b"p" * 32, tail=b"where my worker is")
    assert frames.unpack_hello(body_of(frames.pack_hello(hello))) == hello
    welcome = Welcome(epoch=6, region_bytes=1 << 40, proof=b"p" * 32, tail=b"x" * frames.WELCOME_TAIL_BYTES_MAX)
    assert frames.unpack_welcome(body_of(frames.pack_welcome(welcome))) == welcome
    assert frames.unpack_read(body_of(frames.pack_read(READ)), num_layers=3, num_blocks=5) == READ


def test_a_peers_name_is_cut_between_two_characters() -> None:
    hello = Hello(nonce=b"n" * 16, epoch=5, peer_id="é" * 100, proof=b"p" * 32)
    again = frames.unpack_hello(body_of(frames.pack_hello(hello)))
    assert again.peer_id == "é" * 64
    assert frames.peer_id_bytes(again.peer_id) == frames.peer_id_bytes(hello.peer_id)


@pytest.mark.parametrize("error", [LeaseExpired("a"), StaleEpoch("b: c"), TransferError("d")])
def test_a_refusal_comes_back_in_its_own_class(error: TransferError) -> None:
    again = frames.unpack_refused(body_of(frames.pack_refused(error)))
    assert (type(again), str(again)) == (type(error), str(error))


def test_a_refusal_of_an_unknown_class_is_still_a_transfer_error() -> None:
    again = frames.unpack_refused(b"ConfigError: x")
    assert type(again) is TransferError
    assert "ConfigError: x" in str(again)


@pytest.mark.parametrize(
    ("header", "sentence"),
    [
        (HEADER.pack(b"HTTP", 2, 1, 0), "begins with"),
        (HEADER.pack(b"KVTR", 1, 1, 0), "version 1"),
        (HEADER.pack(b"KVTR", 2, 99, 0), "unknown kind 99"),
        (HEADER.pack(b"KVTR", 2, Kind.READ, 1 << 40), "at most"),
        (HEADER.pack(b"KVTR", 2, Kind.HELLO, 17_000), "at most"),
    ],
)
def test_a_header_that_is_not_ours_is_refused_before_its_length_is_believed(header: bytes, sentence: str) -> None:
    with pytest.raises(MalformedFrame, match=sentence):
        frames.unpack_header(header)


@pytest.mark.parametrize(
    ("head", "runs", "sentence"),
    [
        ((0, 0, 1), [(0, 1)], "layers"),
        ((2, 2, 1), [(0, 1)], "layers 2 to 4 of 3"),
        ((0, 1, 1), [(5, 1)], "blocks 5 to 6 of 5"),
        ((0, 1, 1), [(0, 2**32 - 1)], "of 5"),
        ((0, 1, 1), [(0, 0)], "blocks 0 to 0"),
        ((0, 1, 2), [(0, 1)], "2 runs with"),
        ((0, 1, 0), [], "0 runs"),
        ((0, 1, 2), [(0, 4), (0, 4)], "more blocks than"),
    ],
)
def test_a_read_of_what_the_pool_does_not_have_is_refused(
    head: tuple[int, int, int], runs: list[tuple[int, int]], sentence: str
) -> None:
    body = struct.pack("<16sQIII", b"k", 1, *head) + b"".join(struct.pack("<II", *run) for run in runs)
    with pytest.raises(MalformedFrame, match=sentence):
        frames.unpack_read(body, num_layers=3, num_blocks=5)


@pytest.mark.parametrize("seed", range(50))
def test_noise_is_either_a_message_or_a_malformed_frame(seed: int) -> None:
    chance = random.Random(seed)
    good = frames.pack_read(READ)
    for _ in range(100):
        noise = bytearray(good if chance.random() < 0.7 else chance.randbytes(chance.randint(16, 300)))
        for _ in range(chance.randint(1, 4)):
            noise[chance.randrange(len(noise))] = chance.randrange(256)
        try:
            frames.unpack_header(bytes(noise[: HEADER.size]))
            read = frames.unpack_read(bytes(noise[HEADER.size :]), num_layers=3, num_blocks=5)
        except MalformedFrame:
            continue
        assert read.layers.stop <= 3
        assert all(run.end <= 5 for run in read.blocks)
