from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import uvloop

from disaggregated.config.door import DoorConfig
from disaggregated.errors import ConfigError
from orchestrator.admission.http_tls import LOOK_EVERY_S, front_door_tls
from tests.support.certificates import make_certificate
from tests.support.front_door import front_door


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def config_of(folder: Path) -> DoorConfig:
    cert, key = make_certificate(folder)
    return DoorConfig(cert_file=str(cert), key_file=str(key))


@contextlib.asynccontextmanager
async def listening(context: ssl.SSLContext) -> AsyncIterator[int]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await server.wait_closed()


async def certificate_of(port: int, *, name: str | None) -> bytes:
    """As it is shown to a client that asks for `name`, or for none."""
    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting, server_hostname=name or "")
    shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return bytes(shown)


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_renewed_certificate_is_shown_to_the_next_client_and_a_broken_one_is_not(
    tmp_path: Path, loop: object
) -> None:
    clock = Clock()

    async def play() -> None:
        context = front_door_tls(config_of(tmp_path), clock=clock)
        assert context is not None
        async with listening(context) as port:
            first = await certificate_of(port, name="localhost")
            make_certificate(tmp_path)
            assert await certificate_of(port, name="localhost") == first, "looked at a moment ago"
            clock.now_s += LOOK_EVERY_S
            second = await certificate_of(port, name="localhost")
            assert second != first
            (tmp_path / "door.pem").write_text("torn")
            clock.now_s += LOOK_EVERY_S
            assert await certificate_of(port, name="localhost") == second
            make_certificate(tmp_path)
            clock.now_s += LOOK_EVERY_S
            assert await certificate_of(port, name=None) not in (first, second)

    with asyncio.Runner(loop_factory=loop) as runner:  # type: ignore[arg-type]
        runner.run(play())


def test_without_certificate_it_is_plain_http_and_half_of_one_is_an_error(tmp_path: Path) -> None:
    assert front_door_tls(DoorConfig()) is None
    with pytest.raises(ConfigError, match=r"http_tls_key_file: is missing; http_tls_cert_file needs it"):
        front_door_tls(DoorConfig(cert_file="x"))
    with pytest.raises(ConfigError, match=r"http_tls_cert_file: is missing"):
        front_door_tls(DoorConfig(key_file="x"))


def test_files_that_cannot_be_used_are_named_with_the_configured_key(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    (tmp_path / "door.key").chmod(0o644)
    with pytest.raises(ConfigError, match=r"http_tls_key_file: .*others than its owner may use it; chmod 600"):
        front_door_tls(config)
    (tmp_path / "door.key").unlink()
    with pytest.raises(ConfigError, match=r"http_tls_key_file: .*No such file"):
        front_door_tls(config)
    other = make_certificate(tmp_path, "other")[1]
    with pytest.raises(ConfigError, match="the key does not belong to the certificate"):
        front_door_tls(DoorConfig(cert_file=config.cert_file, key_file=str(other)))
    with pytest.raises(ConfigError, match=r"http_tls_cert_file: .*No such file"):
        front_door_tls(DoorConfig(cert_file=str(tmp_path / "no"), key_file=str(other)))


async def test_answers_and_streams_go_over_tls(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    async with front_door(door=config) as door:
        assert door.url.startswith("https://")
        ours = ssl.create_default_context(cafile=config.cert_file)
        body = {"model": "fake", "prompt": "hello", "max_tokens": 200, "stream": True, "ignore_eos": True}
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=ours)) as http:
            async with http.get(f"{door.url}/health") as answer:
                assert answer.status == 200
            async with http.post(f"{door.url}/v1/completions", json=body) as answer:
                events = (await answer.text()).split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        async with aiohttp.ClientSession() as stranger:
            with pytest.raises(aiohttp.ClientConnectorCertificateError):
                await stranger.get(f"{door.url}/health")
