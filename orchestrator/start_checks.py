"""What would fail later, found before anything is started: by `--check`, and by the start itself.

Servers that we start have our Python and our environment, so what is missing here is missing there. Servers with urls
have their own, and find out themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from disaggregated.config.deployment import DeploymentConfig, PoolConfig
from disaggregated.config.load import check_can_start
from disaggregated.config.server import CacheTransceiverConfig
from disaggregated.errors import ModelUnavailable, PortTaken
from disaggregated.model_files.resolve import foresee
from disaggregated.security import secret, tls
from orchestrator.admission.api_keys import read_keys
from orchestrator.admission.http_tls import front_door_tls
from orchestrator.listening import listen
from orchestrator.routing.make import make_placer

_NEGOTIATED: Final = CacheTransceiverConfig().backend
"""Every process can honour it."""


def check_start(config: DeploymentConfig, environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Sentences about what will be another way than the file says, and may be so.

    Raises ConfigError, which names the key, for what cannot work: keys that are not built, a router, a secret, a
    certificate or a file of API keys that cannot be used, a transport that is not here, two sections that never meet.
    """
    check_can_start(config)
    make_placer(config)
    security = config.security
    secret.find(environ, file=security.cluster_secret_file, key=security.internal_request_auth_key)
    tls.load(security.tls)
    front_door_tls(config.door)
    notes = [*_certificate_notes(config)]
    if config.door.api_keys_file:
        read_keys(Path(config.door.api_keys_file))
    transceivers = {pool.server.role: pool.server.cache_transceiver_config for pool in _started_here(config)}
    if all(each.backend == _NEGOTIATED for each in transceivers.values()):
        return tuple(notes)
    from orchestrator.transport_checks import check_transports  # which takes 18 MB, numpy's for the most part

    return (*notes, *check_transports(transceivers))


def _certificate_notes(config: DeploymentConfig) -> Iterator[str]:
    """Not errors: who renews a certificate late still wants to start."""
    files, door = config.security.tls, config.door
    pairs = (("tls", files.cert_file, files.key_file), ("http_tls", door.cert_file, door.key_file))
    for name, cert_file, key_file in pairs:
        if cert_file and (why := tls.why_not_believed(cert_file, key_file)):
            yield f"{name}_cert_file: {cert_file}: {why}: callers will refuse it; put a new one there, and its key"


def check_port(config: DeploymentConfig) -> tuple[str, ...]:
    """A sentence when somebody listens there: for `--check`, since that may be the deployment that runs now.

    Raises ConfigError when this machine has no such address.
    """
    try:
        listen(config.hostname, config.port).close()
    except PortTaken as error:
        return (str(error),)
    return ()


def check_model(config: DeploymentConfig) -> tuple[str, ...]:
    """Sentences about what becomes of the model before it is served; nothing is fetched or converted here.

    Servers that run already have their model, and our tokenizer may come later: then what is missing is a sentence.

    Raises:
        ModelUnavailable: servers that we would start could not load it.
    """
    if not config.model:
        return ()
    local = [pool.server for pool in (config.context, config.generation) if not pool.urls and pool.num_instances]
    try:
        first = foresee(config.model, weights=any(server.load_format != "dummy" for server in local))
    except ModelUnavailable as error:
        if local:
            raise ModelUnavailable(f"model: {error}") from error
        return (f"model: {error}; requests are answered with 503 until its tokenizer is here",)
    return (f"model: {config.model} {first}",) if first else ()


def _started_here(config: DeploymentConfig) -> list[PoolConfig]:
    """The pools whose backends must be here; none where no KV travels."""
    if config.context.num_instances == 0:
        return []  # Context servers that come later are told the same when they start.
    return [pool for pool in (config.context, config.generation) if not pool.urls]
