"""Calls in frames inside TLS: with the certificates that gRPC has, and not without."""

from __future__ import annotations

from pathlib import Path

import pytest

from disaggregated.errors import ServerLost
from disaggregated.security.membership import Membership
from disaggregated.security.secret import ClusterSecret
from disaggregated.security.tls import TlsFiles, load
from disaggregated.v1 import control_pb2
from disaggregated.wire import WireConnection, client
from tests.support.certificates import make_certificate
from tests.unit.wire.test_calls import Generation, admission, serving

SECRET = ClusterSecret("a secret of the cluster, long enough")


def member(folder: Path) -> Membership:
    """Shows a certificate of its own, believes that one, and wants it from callers, too."""
    folder.mkdir(exist_ok=True)
    cert_file, key_file = map(str, make_certificate(folder, "server"))
    files = TlsFiles(
        cert_file=cert_file, key_file=key_file, ca_file=cert_file, require_client_cert=True, server_name="localhost"
    )
    return Membership(secret=SECRET, tls=load(files))


async def test_both_ends_speak_inside_tls(tmp_path: Path) -> None:
    ours = member(tmp_path)
    async with serving(Generation(), ours) as server:
        connection = await WireConnection.open("127.0.0.1", server.port, membership=ours)
        answer = await connection.ask(b"Generation.Admit", admission("well", *range(100_000)))
        assert control_pb2.AdmitReply.FromString(answer).num_cached_tokens == 100_000
        connection.close()


async def test_a_server_whose_certificate_is_not_believed_is_not_spoken_to(tmp_path: Path) -> None:
    async with serving(Generation(), member(tmp_path / "one")) as server:
        stranger = member(tmp_path / "other")
        with pytest.raises(ServerLost, match="CERTIFICATE_VERIFY_FAILED"):
            await WireConnection.open("127.0.0.1", server.port, membership=stranger)


async def test_a_caller_without_tls_is_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "HANDSHAKE_TIMEOUT_S", 0.2)
    async with serving(Generation(), member(tmp_path)) as server:
        with pytest.raises(ServerLost):
            await WireConnection.open("127.0.0.1", server.port, membership=Membership(secret=SECRET))
