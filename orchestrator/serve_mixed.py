"""`disaggregated serve mixed MODEL`: the same front door and the same engine, aggregated.

One generation server prefills the prompts itself, in chunks between its decode steps, and there is no context server to
hand anything over. It is the baseline for a split deployment, and the better choice where one processor is all there
is. It can be split while it runs: `disaggregated scale context=1`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any, Final

from disaggregated.config.deployment import DeploymentConfig, PoolConfig
from disaggregated.config.fields import fill
from disaggregated.config.security import SecurityConfig
from disaggregated.config.server import ServerConfig
from disaggregated.config.server_cli import model_command

_FRONT_DOOR: Final = {"host": "hostname", "port": "port", "log_level": "log_level"}
"""What a server's flags of these names say about the orchestrator here."""
_SECURITY: Final = "security."
_NOT_FOR_THE_SERVER: Final = ("host", "port", f"{_SECURITY}cluster_secret_file")
"""Its secret it gets in its environment."""

HELP: Final = """Serve MODEL from one process that prefills and decodes, behind the OpenAI API.

MODEL is a bundled name, a Hugging Face directory or a GGUF file. --host and --port are those of the API. Stop it with
Ctrl-C. The environment variables of a deployment file have no effect here.
"""


def mixed_deployment(model: str, fields: Mapping[str, object]) -> DeploymentConfig:
    """`fields`: dotted fields of ServerConfig that were named on the command line or in its file."""
    front_door: dict[str, Any] = {_FRONT_DOOR[name]: value for name, value in fields.items() if name in _FRONT_DOOR}
    engine = {
        name: value for name, value in fields.items() if name not in ("host", "port", "security.cluster_secret_file")
    }
    template = ServerConfig(model=model, role="generation", host="127.0.0.1", port=0)
    generation = PoolConfig(
        num_instances=1,
        server=fill(template, engine),
        spread_threads=not {"num_threads", "cpu_affinity"} & fields.keys(),
    )
    context = dataclasses.replace(
        generation, num_instances=0, server=dataclasses.replace(generation.server, role="context")
    )
    security = fill(
        SecurityConfig(),
        {name.removeprefix("security."): fields[name] for name in fields if name.startswith("security.")},
    )
    return DeploymentConfig(**front_door, security=security, model=model, context=context, generation=generation)


def how_to_call(address: str, model: str) -> str:
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    return (
        f"One server prefills and decodes {model}. It answers as soon as the model is loaded:\n"
        f"  curl http://{address}/v1/chat/completions -H 'content-type: application/json' -d '{body}'\n"
        "Split it while it runs: disaggregated scale context=1. Stop it: Ctrl-C."
    )


def serve_mixed(model: str, fields: Mapping[str, object]) -> int:
    from orchestrator.run import run

    def say_how(address: str) -> None:
        sys.stderr.write(how_to_call(address, model) + "\n")

    return run(mixed_deployment(model, fields), on_listening=say_how)


if __name__ == "__main__":
    model_command("serve_mixed", HELP, serve_mixed)()
