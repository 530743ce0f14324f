"""Proofs of calls: who does not know the secret has none, and nothing that was heard is of use twice."""

from __future__ import annotations

import random
import secrets

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disaggregated.errors import DisaggregatedError, ServerLost, Unauthenticated
from disaggregated.security import session as sessions
from disaggregated.security.secret import ClusterSecret
from disaggregated.security.session import CallerSession, ServerSessions

SECRET = ClusterSecret("s" * 32)
METHOD = b"/disaggregated.v1.Generation/Admit"


def begun(server: ServerSessions, secret: ClusterSecret = SECRET) -> CallerSession:
    nonce = secrets.token_bytes(sessions.NONCE_BYTES)
    return CallerSession.from_welcome(secret, nonce, server.greet(nonce), address="here")


def test_a_member_may_call_as_often_as_it_likes() -> None:
    server = ServerSessions(SECRET)
    caller = begun(server)
    for _ in range(3000):
        server.check(caller.sign(METHOD), METHOD)
    assert len(server) == 1


@pytest.mark.parametrize("proof", [None, b"", b"x" * 55, b"x" * 57, b"x" * 10_000])
def test_a_call_without_a_proof_is_told_what_to_do(proof: bytes | None) -> None:
    with pytest.raises(
        Unauthenticated, match=r"cluster_secret_file, or the environment variable DISAGG_CLUSTER_SECRET"
    ):
        ServerSessions(SECRET).check(proof, METHOD)


def test_a_caller_with_another_secret_learns_so_before_its_first_call() -> None:
    with pytest.raises(Unauthenticated, match="here has another cluster secret than we"):
        begun(ServerSessions(SECRET), ClusterSecret("t" * 32))


@pytest.mark.parametrize(("welcome", "sentence"), [(b"", "has no cluster secret"), (b"?" * 47, "no server of ours")])
def test_what_is_no_server_of_the_cluster_is_not_called(welcome: bytes, sentence: str) -> None:
    with pytest.raises(Unauthenticated, match=sentence):
        CallerSession.from_welcome(SECRET, b"n" * 16, welcome, address="here")


def test_a_call_that_was_heard_is_of_no_use_a_second_time() -> None:
    server = ServerSessions(SECRET)
    heard = begun(server).sign(METHOD)
    server.check(heard, METHOD)
    with pytest.raises(Unauthenticated, match="came before"):
        server.check(heard, METHOD)


def test_a_proof_is_for_one_method() -> None:
    server = ServerSessions(SECRET)
    with pytest.raises(Unauthenticated):
        server.check(begun(server).sign(METHOD), b"/disaggregated.v1.Server/Drain")


def test_a_proof_for_one_server_is_of_no_use_at_another_nor_after_a_restart() -> None:
    server = ServerSessions(SECRET)
    heard = begun(server).sign(METHOD)
    for other in (ServerSessions(SECRET), ServerSessions(ClusterSecret("t" * 32))):
        begun_there = other.greet(b"n" * 16)
        assert begun_there
        with pytest.raises(ServerLost, match="started again"):
            other.check(heard, METHOD)


def test_any_changed_bit_of_a_proof_is_found() -> None:
    server = ServerSessions(SECRET)
    good = begun(server).sign(METHOD)
    for bit in range(len(good) * 8):
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DisaggregatedError):
            server.check(bytes(damaged), METHOD)
    assert len(server) == 0, "a wrong proof has made us remember something"
    server.check(good, METHOD)


def test_greetings_alone_cost_no_memory() -> None:
    server = ServerSessions(SECRET)
    for _ in range(1000):
        server.greet(b"n" * 16)
    assert len(server) == 0
    with pytest.raises(Unauthenticated, match="nonce of 16 bytes, not 3"):
        server.greet(b"abc")


@pytest.mark.parametrize("seed", range(20))
def test_calls_that_overtake_each_other_are_each_served_once(seed: int) -> None:
    server, chance = ServerSessions(SECRET), random.Random(seed)
    caller = begun(server)
    proofs = [caller.sign(METHOD) for _ in range(300)]
    for begin in range(0, 300, 100):
        late = proofs[begin : begin + 100]
        chance.shuffle(late)
        for proof in late:
            server.check(proof, METHOD)
    for proof in chance.sample(proofs, 50):
        with pytest.raises(Unauthenticated):
            server.check(proof, METHOD)


@given(st.lists(st.integers(min_value=1, max_value=3 * sessions.WINDOW), max_size=60))
@settings(max_examples=200)
def test_no_count_is_ever_taken_twice(counts: list[int]) -> None:
    window = sessions._ServerSession(b"")
    taken: set[int] = set()
    for count in counts:
        if window.take(count):
            assert count not in taken
            taken.add(count)
        else:
            assert count in taken or count <= max(taken) - sessions.WINDOW


def test_the_session_that_was_silent_longest_makes_way_and_cannot_be_revived() -> None:
    server = ServerSessions(SECRET, sessions_max=3)
    silent, talking = begun(server), begun(server)
    heard = silent.sign(METHOD)
    server.check(heard, METHOD)
    for _ in range(20):
        server.check(talking.sign(METHOD), METHOD)
        server.check(begun(server).sign(METHOD), METHOD)
    assert len(server) == 3
    server.check(talking.sign(METHOD), METHOD)
    for proof in (heard, silent.sign(METHOD)):
        with pytest.raises(ServerLost):
            server.check(proof, METHOD)


def test_a_session_number_that_was_never_given_is_refused() -> None:
    server, nonce = ServerSessions(SECRET), b"n" * 16
    boot = server.greet(nonce)[:8]
    for number in (0, 2, 2**64 - 1):
        key = sessions._session_key(SECRET, nonce, boot, number)
        with pytest.raises(ServerLost):
            server.check(CallerSession(key, boot=boot, number=number, nonce=nonce).sign(METHOD), METHOD)
