"""The keyword arguments of an `LLM`: the keys of a server section, by the same table and with the same messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from disaggregated import logs
from disaggregated.config.fields import fill
from disaggregated.config.reader import Source, collect, decide
from disaggregated.config.server import ServerConfig
from disaggregated.config.server_keys import SERVER_KEYS
from disaggregated.cores import available_cores
from disaggregated.errors import ConfigError

log = logs.get(__name__)

_SOURCE: Final = Source("LLM")


def engine_config(model: str, options: Mapping[str, object]) -> ServerConfig:
    """`num_threads` is every core that this process may use, unless `options` say otherwise.

    Raises:
        ConfigError: names the option that is unknown, wrong, or not built yet.
    """
    found, notes = collect(options, SERVER_KEYS, _SOURCE)
    decision = decide(found, SERVER_KEYS, _SOURCE)
    if decision.not_built:
        raise ConfigError(f"LLM: {decision.not_built[0]}")
    if "cpu_affinity" in decision.fields:
        raise _SOURCE.error("cpu_affinity", "pins a server's process; this one is yours: os.sched_setaffinity pins it")
    for note in [*notes, *decision.notes]:
        log.info("config_note", note=note)
    defaults = ServerConfig(model=model, role="generation", num_threads=len(available_cores()))
    return fill(defaults, decision.fields)
