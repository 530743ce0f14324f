"""Prints docs/config.md from the key tables: `python -m disaggregated.config.document > docs/config.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from disaggregated.config.deployment import DeploymentConfig, PoolConfig, RouterConfig
from disaggregated.config.deployment_keys import SECTION_KEYS, TOP_KEYS
from disaggregated.config.environment import KNOWN_NAMES, OTHER_NAMES, SWITCHES
from disaggregated.config.fields import dotted
from disaggregated.config.key_table import Key, Outcome
from disaggregated.config.server import ServerConfig
from disaggregated.config.server_keys import FLATTENED, SERVER_KEYS

_HEAD = """\
# Configuration

<!-- Printed by `make docs` from disaggregated/config/*_keys.py; change it there. -->

One YAML file is one deployment: `disaggregated -c disagg-config.yml`. `configs/disagg-config.yml` shows every key with
its default. Key names are TensorRT-LLM's where it has one, and its files load as they are. Each key is one of these:

- **honoured**: it does what it says;
- **no effect**: it asks for another way to the same result; it is taken, and named in one line at start;
- **not built yet**: it asks for a result that does not exist here yet; the file loads, and is refused at start;
- **refused**: it can't be, and the message says why.

An unknown key, a key that stands twice, a value outside its bounds, and a top-level key that a section contradicts are
errors, in one line that names the key: `disagg-config.yml: generation_servers.num_instances: must be at least 1, is 0`.
"""

_ENVIRONMENT = """\
## Environment

A variable `DISAGG__` followed by a key's path overrides the file, with `__` for each step into a section; the value is
read as YAML. What was overridden is named in one line at start.

    DISAGG__PORT=9000
    DISAGG__GENERATION_SERVERS__MAX_BATCH_SIZE=8
    DISAGG__CONTEXT_SERVERS__KV_CACHE_CONFIG__TOKENS_PER_BLOCK=64

Names that other servers' scripts set:
"""

_RULES = """\
## How sections inherit

An engine argument at the top level holds for `context_servers` and `generation_servers`. A section may repeat it with
the same value; another value is an error, since one of the two would be ignored. `model` must be the same in both.

Servers with `urls` are started by somebody else: `num_instances` must be their number if it is there at all, and engine
arguments have no effect on them. Without `urls`, `num_instances` processes are started on this machine, each pinned to
its share of the cores unless `num_threads` or `cpu_affinity` says otherwise.

A server's own file (`serve context MODEL --config FILE`) takes the engine arguments, and each of them is also a flag:
`--max_batch_size 16`, `--max-batch-size=16`, `--kv_cache_config.tokens_per_block 64`. A flag wins over the file.
"""


def document() -> str:
    parts = [_HEAD]
    parts.append(_table("## Top level", [key for key in TOP_KEYS if _has_effect(key)], _deployment_defaults()))
    own = [key for key in SECTION_KEYS if key.name not in SERVER_KEYS and _has_effect(key)]
    parts.append(_table("## `context_servers`, `generation_servers`", own, _pool_defaults()))
    engine = [key for key in SERVER_KEYS if _has_effect(key)]
    parts.append(_table("## Engine arguments (of a section, or of both at the top level)", engine, _server_defaults()))
    parts += [_RULES, _ENVIRONMENT + "\n" + "\n".join(_environment_lines()) + "\n", _aliases()]
    for outcome in (Outcome.NOT_BUILT, Outcome.REFUSED, Outcome.NO_EFFECT):
        parts.append(_reasons(outcome))
    return "\n".join(parts)


def _has_effect(key: Key) -> bool:
    return key.outcome is Outcome.HONOURED


def _table(title: str, keys: Iterable[Key], defaults: dict[str, object]) -> str:
    lines = [title, "", "| key | value | default | meaning |", "|---|---|---|---|"]
    for key in keys:
        default = defaults.get(key.target)
        shown = (
            "" if default in (None, "", ()) else f"`{str(default).lower() if isinstance(default, bool) else default}`"
        )
        lines.append(f"| `{key.name}` | {key.kind.words} | {shown} | {key.says}{_exceptions(key)} |")
    return "\n".join(lines) + "\n"


def _exceptions(key: Key) -> str:
    missing = [f"`{value}`" for value in key.not_built_values]
    text = f" Not built yet: {', '.join(missing)}." if missing else ""
    for reason in dict.fromkeys(key.substitutes.values()):
        values = ", ".join(f"`{value}`" for value, why in key.substitutes.items() if why == reason)
        text += f" {values}: {reason[1]}."
    return text


def _reasons(outcome: Outcome) -> str:
    lines = [f"## Keys that are {outcome.value}" if outcome is not Outcome.NO_EFFECT else "## Keys without effect", ""]
    by_reason: dict[str, list[str]] = {}
    for key in _unique_keys(outcome):
        fine = f" (other than {', '.join(_yaml(value) for value in key.harmless)})" if key.harmless else ""
        by_reason.setdefault(key.says, []).append(f"`{key.name}`{fine}")
    lines += [f"- {', '.join(names)}: {reason}." for reason, names in by_reason.items()]
    return "\n".join(lines) + "\n"


def _yaml(value: object) -> str:
    return f"`{str(value).lower()}`"


def _unique_keys(outcome: Outcome) -> Iterator[Key]:
    seen: set[str] = set()
    for table in (TOP_KEYS, SECTION_KEYS):
        for key in table:
            if key.outcome is outcome and key.name not in seen:
                seen.add(key.name)
                yield key


def _aliases() -> str:
    lines = ["## Other spellings", ""]
    lines += [f"- `{alias.name}`: `{alias.of}`" for alias in SECTION_KEYS.aliases]
    lines.append(f"- the keys of `{FLATTENED}` are taken as if they stood in the section itself")
    lines.append("- `null`, and the text `None`, are a key left out; `True` and `true` are the same")
    return "\n".join(lines) + "\n"


def _environment_lines() -> Iterator[str]:
    for name, path in KNOWN_NAMES.items():
        yield f"- `{name}`: as `DISAGG__{path.upper().replace('.', '__')}`"
    for name, (path, value) in SWITCHES.items():
        yield f"- `{name}=1`: as `DISAGG__{path.upper().replace('.', '__')}={value}`"
    for name, says in OTHER_NAMES.items():
        yield f"- `{name}`: {says}"


def _server_defaults() -> dict[str, object]:
    return dict(dotted(ServerConfig(model="", role="")))


def _pool_defaults() -> dict[str, object]:
    return dict(dotted(PoolConfig(server=ServerConfig(model="", role="")))) | {"router.type": RouterConfig().type}


def _deployment_defaults() -> dict[str, object]:
    pool = PoolConfig(server=ServerConfig(model="", role=""))
    return dict(dotted(DeploymentConfig(context=pool, generation=pool)))


if __name__ == "__main__":
    sys.stdout.write(document())
