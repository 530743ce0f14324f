"""The cluster's secret: where it may come from, who may read it, and that it is shown nowhere."""

from __future__ import annotations

import copy
import os
import pathlib
import pickle
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disaggregated.errors import ConfigError
from disaggregated.security import secret as secrets_of
from disaggregated.security.membership import (
    NOBODY,
    Membership,
    check_may_listen,
    is_loopback,
    join,
    join_as_told,
    of_this_process,
)
from disaggregated.security.secret import OPEN, VARIABLE, ClusterSecret, find, mac, read_file
from disaggregated.security.status import SecretStatus, secret_status
from disaggregated.security.tls import TlsFiles

TEXT = "0123456789abcdef0123456789abcdef"
OTHER = "fedcba9876543210fedcba9876543210"


def written(folder: pathlib.Path, text: str | bytes = TEXT, *, mode: int = 0o600) -> str:
    path = folder / "cluster.secret"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(mode)
    return str(path)


def test_a_file_and_the_environment_give_the_same_secret(tmp_path: pathlib.Path) -> None:
    assert find({}, file=written(tmp_path, f"{TEXT}\n")) == find({VARIABLE: TEXT}) == ClusterSecret(TEXT)


def test_without_any_place_the_deployment_is_open() -> None:
    assert find({}) == OPEN
    assert OPEN.is_open
    assert OPEN.for_child() == {}


def test_a_random_secret_is_another_each_time_and_reaches_a_child() -> None:
    one, other = ClusterSecret.random(), ClusterSecret.random()
    assert one != other
    assert find(one.for_child()) == one


def test_places_that_agree_are_fine_and_places_that_do_not_are_named(tmp_path: pathlib.Path) -> None:
    file = written(tmp_path)
    assert find({VARIABLE: TEXT}, file=file, key=TEXT) == ClusterSecret(TEXT)
    with pytest.raises(ConfigError, match="cluster_secret_file and DISAGG_CLUSTER_SECRET hold different secrets"):
        find({VARIABLE: OTHER}, file=file)
    with pytest.raises(ConfigError, match="internal_request_auth_key and DISAGG_CLUSTER_SECRET"):
        find({VARIABLE: OTHER}, key=TEXT)


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o440])
def test_a_file_that_its_owner_and_group_may_read_is_taken(tmp_path: pathlib.Path, mode: int) -> None:
    assert read_file(written(tmp_path, mode=mode)) == ClusterSecret(TEXT)


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o660, 0o602, 0o666, 0o601])
def test_a_file_that_others_may_use_is_refused_with_what_to_do(tmp_path: pathlib.Path, mode: int) -> None:
    path = written(tmp_path, mode=mode)
    with pytest.raises(ConfigError, match=rf"cluster_secret_file: {path}: others .*mode {mode:o}\); chmod 600 {path}"):
        read_file(path)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_refused(tmp_path: pathlib.Path) -> None:
    path = written(tmp_path)
    os.chown(path, 12345, -1)
    with pytest.raises(ConfigError, match="belongs to user 12345"):
        read_file(path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty; openssl rand"),
        (b" \n\n", "is empty"),
        (TEXT[:31].encode(), "has 31 characters, 32 to 4096"),
        (b"x" * 5000, "has 4098 characters"),
        (b"\xff\xfe" * 40, "is not text"),
    ],
)
def test_a_file_that_holds_no_secret_is_refused(tmp_path: pathlib.Path, content: bytes, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        read_file(written(tmp_path, content))


def test_a_file_that_is_not_there_and_one_that_is_none_are_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"cluster_secret_file: .*missing: No such file"):
        read_file(str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="Is a directory"):
        read_file(str(tmp_path))
    with pytest.raises(ConfigError, match="is not a file"):
        read_file("/dev/null")


def test_a_variable_that_is_too_short_is_named_and_not_shown() -> None:
    with pytest.raises(ConfigError, match="DISAGG_CLUSTER_SECRET: the cluster's secret has 6 characters") as caught:
        find({VARIABLE: "hunter"})
    assert "hunter" not in str(caught.value)


@pytest.mark.parametrize("show", [repr, str, "{}".format, lambda secret: repr(Membership(secret=secret))])
def test_a_secret_is_not_shown(show: Callable[[ClusterSecret], str]) -> None:
    secret = ClusterSecret(TEXT)
    assert TEXT not in show(secret)
    assert secret.derive("x").hex() not in show(secret)


@pytest.mark.parametrize("write", [pickle.dumps, copy.deepcopy])
def test_a_secret_is_not_written_anywhere(write: Callable[[ClusterSecret], object]) -> None:
    with pytest.raises(TypeError, match="not written"):
        write(ClusterSecret(TEXT))


@given(st.lists(st.binary(max_size=8), max_size=4), st.lists(st.binary(max_size=8), max_size=4))
def test_two_lists_of_parts_have_one_key_only_when_they_are_equal(one: list[bytes], other: list[bytes]) -> None:
    secret = ClusterSecret(TEXT)
    assert (secret.derive("p", *one) == secret.derive("p", *other)) == (one == other)
    assert mac(b"k", "ab", b"c") != mac(b"k", "a", b"bc")


def test_keys_of_one_secret_differ_by_purpose_and_those_of_two_differ_altogether() -> None:
    assert ClusterSecret(TEXT).derive("a") != ClusterSecret(TEXT).derive("b")
    assert ClusterSecret(TEXT).derive("a") != ClusterSecret(OTHER).derive("a")
    assert len(ClusterSecret(TEXT).derive("a")) == 32


def test_a_process_takes_its_secret_out_of_its_environment() -> None:
    before = of_this_process()
    environ = {VARIABLE: TEXT, "PATH": "/bin"}
    try:
        assert join_as_told(secret_file="", tls=TlsFiles(), environ=environ) is of_this_process()
        assert of_this_process().secret == ClusterSecret(TEXT)
        assert environ == {"PATH": "/bin"}
    finally:
        join(before)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1.2.3", "::1", "[::1]"])
def test_loopback_is_listened_on_without_a_secret(host: str) -> None:
    assert is_loopback(host)
    check_may_listen(host, NOBODY)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "", "10.0.0.1", "192.168.1.2", "fe80::1%eth0", "no-such-host.invalid"]
)
def test_any_other_address_wants_a_secret(host: str) -> None:
    with pytest.raises(
        ConfigError, match=r"set cluster_secret_file or DISAGG_CLUSTER_SECRET .* or listen on localhost"
    ):
        check_may_listen(host, NOBODY)
    check_may_listen(host, Membership(secret=ClusterSecret(TEXT)))


def test_the_status_tells_where_the_secret_is_and_never_what(tmp_path: pathlib.Path) -> None:
    assert secret_status({}).says.startswith("none in the environment")
    assert secret_status({VARIABLE: TEXT}) == SecretStatus(
        is_usable=True, is_set=True, says="set by DISAGG_CLUSTER_SECRET"
    )
    path = written(tmp_path)
    named = secret_status({"DISAGG__CLUSTER_SECRET_FILE": path})
    assert named == SecretStatus(is_usable=True, is_set=True, says=f"set by cluster_secret_file: {path}")
    os.chmod(path, 0o644)
    assert not secret_status({"DISAGG__CLUSTER_SECRET_FILE": path}).is_usable


def test_the_advice_makes_a_secret_that_is_long_enough() -> None:
    assert secrets_of.HOW_TO_MAKE_ONE == "openssl rand -hex 32"
    assert secrets_of.CHARACTERS_MIN <= 2 * 32
