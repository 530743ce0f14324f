"""The command line of one server: the keys of a server section as flags, and a few that only a process of its own has.

`python -m context_server MODEL --port 8001 --config context_config.yml --max_batch_size=16`

A flag wins over a TRTLLM_USE_…_KVCACHE switch in the environment, which wins over the `--config` file, which wins over
the default. Hyphens and underscores in a flag are the same.
Flags and file share one key table, hence one set of names, bounds and messages.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import click

from disaggregated.config import environment, security_keys
from disaggregated.config.fields import dotted, fill
from disaggregated.config.key_table import Alias, Key, KeyTable, Outcome, honoured, refused
from disaggregated.config.kinds import ANYTHING, BOOLEAN, TEXT, BadValue, choice, integer
from disaggregated.config.one_line import one_line_errors
from disaggregated.config.reader import Found, Source, collect, decide
from disaggregated.config.server import ServerConfig
from disaggregated.config.server_keys import SERVER_KEYS
from disaggregated.config.yaml_file import read_yaml
from disaggregated.errors import ConfigError
from disaggregated.parent_death import die_with_parent

_NO_DISCOVERY: Final = "servers do not look for their orchestrator; name them in its urls"

LOG_LEVEL: Final = choice(
    "debug", "info", "warning", "error", spellings={"verbose": "debug", "trace": "debug", "internal_error": "error"}
)

FLAG_KEYS: Final = KeyTable(
    [
        *(key for key in SERVER_KEYS if key.name != "model"),
        honoured("host", TEXT, "Address to listen on."),
        honoured("port", integer(0, 65535), "Port to listen on; 0: any free one, named in the ready line."),
        honoured(
            "wire_port",
            integer(0, 65535),
            "Port for the orchestrator's calls in frames, to be named where a firewall has to let it through; 0: any "
            "free one. Callers ask at --port which it is.",
        ),
        honoured("log_level", LOG_LEVEL, "debug, info, warning or error."),
        *security_keys.COMMON,
        refused("metadata_server_config_file", TEXT, _NO_DISCOVERY),
        refused("disagg_cluster_uri", TEXT, _NO_DISCOVERY),
        refused("num_workers", integer(1), "a server is one process", harmless=(1,)),
        refused("generation_config", ANYTHING, "generation defaults are the model's own"),
        refused("telemetry", BOOLEAN, "there is no telemetry to switch on", harmless=(False,)),
    ],
    SERVER_KEYS.aliases,
)
"""What may stand on the command line; `model` is its argument."""

FILE_KEYS: Final = KeyTable([*SERVER_KEYS, *security_keys.COMMON], SERVER_KEYS.aliases)
"""What may stand in a server's own file."""

_SECRET_FIELD: Final = "security.internal_request_auth_key"
"""Not on a command line, which everybody on the machine can read: servers get it in their environment."""
_FLAG_TARGETS: Final = {key.target: key for key in FLAG_KEYS if key.outcome is Outcome.HONOURED}


class _OneLineCommand(click.Command):
    """A mistake on the command line is one line on stderr and exit code 2, without the usage around it."""

    def main(self, *args: Any, **extra: Any) -> Any:
        with one_line_errors((self.name or "").replace("_", " ")):
            return super().main(*args, **{**extra, "standalone_mode": False})


def normalise_flag(name: str) -> str:
    """Hyphens and underscores are the same to us; applied by click to what is typed and to what is declared."""
    return name.replace("_", "-")


def server_command(role: str, main: Callable[[ServerConfig], int]) -> click.Command:
    """The click command of one role. It exits with what `main` returns, or with a StartupError's code and one line."""

    def run(model: str, fields: Mapping[str, object]) -> int:
        die_with_parent()
        return main(fill(ServerConfig(model=model, role=role), fields))

    return model_command(
        f"{role}_server",
        f"Run one {role} server for MODEL: a bundled name, a Hugging Face directory or a GGUF file.",
        run,
    )


def model_command(name: str, help_text: str, main: Callable[[str, Mapping[str, object]], int]) -> click.Command:
    """A command that takes MODEL and a server's flags. `main` gets the model and what was said of it: dotted fields of
    ServerConfig, checked, those only that the flags or the file name."""

    def run(model: str, config_file: Path | None, **flags: object) -> None:
        sys.exit(main(model, _fields_said(name, config_file, _flags_found(flags))))

    config_help = "YAML file with these keys, as TensorRT-LLM's extra_llm_api_options; a flag wins over it."
    file_type = click.Path(path_type=Path)
    config_option = click.Option(
        ["config_file", "--config", "--extra-llm-api-options"], type=file_type, metavar="FILE", help=config_help
    )
    return _OneLineCommand(
        name=name,
        callback=run,
        params=[click.Argument(["model"]), config_option, *_options()],
        help=help_text,
        context_settings={"token_normalize_func": normalise_flag, "help_option_names": ["-h", "--help"]},
    )


def server_config(role: str, model: str, config_file: Path | None = None, flags: Sequence[Found] = ()) -> ServerConfig:
    """What a server is told by its argument, its file and its flags. Raises ConfigError; notes go to stderr."""
    return fill(ServerConfig(model=model, role=role), _fields_said(f"{role}_server", config_file, flags))


def _fields_said(name: str, config_file: Path | None, flags: Sequence[Found]) -> dict[str, object]:
    source = Source(config_file.name if config_file else "")
    in_file, notes = collect(read_yaml(config_file), FILE_KEYS, source) if config_file else ([], [])
    named = {FLAG_KEYS.canonical(flag.name) for flag in flags}
    in_environment = [Found(*each) for each in environment.switched(os.environ) if each[1] not in named]
    named |= {found.name for found in in_environment}
    kept = [item for item in in_file if FILE_KEYS.canonical(item.name) not in named and item.name != "model"]
    from_file = decide(kept, FILE_KEYS, source)
    from_flags = decide([*in_environment, *flags], FLAG_KEYS, Source(""))
    missing = [f"{source.name}: {line}" for line in from_file.not_built] + from_flags.not_built
    if missing:
        raise ConfigError(missing[0])
    for note in [*notes, *from_file.notes, *from_flags.notes]:
        click.echo(f"{name.replace('_', ' ')}: note: {note}", err=True)
    return from_file.fields | from_flags.fields


def to_arguments(config: ServerConfig) -> list[str]:
    """The command line that gives `config` again: for starting a server with exactly this configuration."""
    arguments = [config.model]
    defaults = dict(dotted(ServerConfig(model=config.model, role=config.role)))
    for name, value in dotted(config):
        if value == defaults[name] or name in ("model", "role", _SECRET_FIELD):
            continue
        key = _FLAG_TARGETS[name]
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        if _is_switch(key):
            arguments.append(f"--{key.name}" if value else f"--no-{key.name}")
        else:
            arguments.append(f"--{key.name}={text}")
    return arguments


def _options() -> list[click.Parameter]:
    shown = [_option(key) for key in FLAG_KEYS if key.outcome is Outcome.HONOURED]
    hidden = [_option(key) for key in FLAG_KEYS if key.outcome is not Outcome.HONOURED]
    return [*shown, *hidden]


def _option(key: Key) -> click.Option:
    names = [key.name, *(alias.name for alias in _flag_aliases(key))]
    hidden = key.outcome is not Outcome.HONOURED
    spellings = [f"--{normalise_flag(name)}" for name in names]
    if _is_switch(key):
        spellings = [f"{spelling}/--no-{spelling[2:]}" for spelling in spellings]
        return click.Option([_identifier(key.name), *spellings], default=None, hidden=hidden, help=key.says)
    help_text = f"{key.says}{_default_words(key)}"
    return click.Option(
        [_identifier(key.name), *spellings], type=_reading(key), metavar=_metavar(key), hidden=hidden, help=help_text
    )


def _flag_aliases(key: Key) -> list[Alias]:
    return [alias for alias in FLAG_KEYS.aliases if alias.of == key.name and "." not in alias.name]


def _is_switch(key: Key) -> bool:
    """TensorRT-LLM's boolean flags take no value; a key of a sub-section (ours as a flag) takes true or false."""
    return key.kind is BOOLEAN and "." not in key.name


def _identifier(name: str) -> str:
    return name.replace(".", "__")


def _metavar(key: Key) -> str:
    return key.kind.words.split(",")[0].removeprefix("a ").upper() if not key.kind.is_text else "TEXT"


def _default_words(key: Key) -> str:
    default = dict(dotted(ServerConfig(model="", role=""))).get(key.target)
    return "" if default in (None, "", ()) else f"  [{default}]"


def _reading(key: Key) -> Callable[[object], Found]:
    """A flag's text through the key's own kind, so that the message is the file's."""

    def read(value: object) -> Found:
        try:
            return Found(f"--{key.name}", key.name, key.kind.from_text(str(value)))
        except BadValue as error:
            raise click.UsageError(f"--{key.name}: {error}") from None

    return read


def _flags_found(flags: dict[str, object]) -> list[Found]:
    found = []
    for identifier, value in flags.items():
        if isinstance(value, bool):
            name = identifier.replace("__", ".")
            found.append(Found(f"--{name}", name, value))
        elif isinstance(value, Found):
            found.append(value)
    return found
