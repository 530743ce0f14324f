"""Loads a deployment file: YAML, overridden by the environment, checked by the key table, put into a DeploymentConfig.

disagg-config.yml ─▶ top-level keys ────────────────────────▶ DeploymentConfig
                  ├▶ engine arguments ──inherited by both──┐
                  ├▶ context_servers ──────────────────────┼▶ PoolConfig
                  └▶ generation_servers ───────────────────┘
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from disaggregated.config.deployment import DeploymentConfig, PoolConfig, RouterConfig
from disaggregated.config.deployment_keys import SECTION_KEYS, TOP_KEYS
from disaggregated.config.door import DoorConfig
from disaggregated.config.environment import override, overrides, remarks
from disaggregated.config.fields import fill
from disaggregated.config.kinds import did_you_mean, shown
from disaggregated.config.reader import Decision, Found, Source, collect, decide, inherit
from disaggregated.config.security import SecurityConfig
from disaggregated.config.server import ServerConfig
from disaggregated.config.server_keys import FLATTENED, SERVER_KEYS
from disaggregated.config.text_keys import lift_text_keys
from disaggregated.config.yaml_file import read_yaml
from disaggregated.errors import ConfigError

_ROUTER: Final = "router."
_SECTIONS: Final = {"context": "context_servers", "generation": "generation_servers"}


def load_deployment(path: Path, environ: Mapping[str, str]) -> DeploymentConfig:
    """The file's deployment. Raises ConfigError with one line that names the key.

    What the file asks for and does not exist yet is in `not_built`, so that any TensorRT-LLM file can be read and told
    about in full; `check_can_start` refuses it.
    """
    document = read_yaml(path)
    overriding = overrides(environ)
    for at, (_, value) in overriding.items():
        document = override(document, at, value)
    source = Source(path.name, {at: name for at, (name, _) in overriding.items()})
    notes = [f"{at}: set by {name}" for at, (name, _) in overriding.items()]
    return _deployment(document, source, [*notes, *remarks(environ)])


def check_can_start(config: DeploymentConfig) -> None:
    """Raises ConfigError when the deployment asks for what is not built."""
    if config.not_built:
        raise ConfigError("; ".join(config.not_built))


def _deployment(document: Mapping[str, object], source: Source, notes: list[str]) -> DeploymentConfig:
    document = lift_text_keys(document, source)
    top, general = _split_top_level(document, source)
    found, _ = collect(top, TOP_KEYS, source)
    own = decide(found, TOP_KEYS, source)
    inherited, shape_notes = collect(general, SERVER_KEYS, source)
    decisions = {role: _section(document, role, inherited, source) for role in _SECTIONS}
    _check_no_mixed_server(decisions, source)
    model = _model(decisions, source)
    every = [own, *decisions.values()]
    fields: dict[str, Any] = dict(own.fields)
    security = fill(SecurityConfig(), _taken(fields, "security."))
    door = fill(DoorConfig(), _taken(fields, "door."))
    template = ServerConfig(
        model=model or "",
        role="",
        host="127.0.0.1",
        port=0,
        log_level=fields.get("log_level", "info"),
        security=SecurityConfig(tls=security.tls),  # Their secret they get in their environment.
    )
    return DeploymentConfig(
        **fields,
        security=security,
        door=door,
        model=model,
        context=_pool("context", decisions["context"], template),
        generation=_pool("generation", decisions["generation"], template),
        notes=_unique(notes + shape_notes + [note for decision in every for note in decision.notes]),
        not_built=_unique([line for decision in every for line in decision.not_built]),
    )


def _taken(fields: dict[str, Any], prefix: str) -> dict[str, object]:
    """Those that begin with `prefix`, without it; they are no longer in `fields`."""
    return {name.removeprefix(prefix): fields.pop(name) for name in list(fields) if name.startswith(prefix)}


def _split_top_level(document: Mapping[str, object], source: Source) -> tuple[dict[str, object], dict[str, object]]:
    """The deployment's own keys, and those that both sections inherit. A key that is neither is an error here."""
    top: dict[str, object] = {}
    general: dict[str, object] = {}
    for key, value in document.items():
        if key in _SECTIONS.values():
            continue
        if key in TOP_KEYS or TOP_KEYS.is_group(key):
            top[key] = value
        elif key in SERVER_KEYS or SERVER_KEYS.is_group(key) or key == FLATTENED:
            general[key] = value
        else:
            known = [*_SECTIONS.values(), *(name.name for name in TOP_KEYS), *(name.name for name in SERVER_KEYS)]
            raise source.error(key, f"unknown key{did_you_mean(key, known)}")
    return top, general


def _section(document: Mapping[str, object], role: str, inherited: list[Found], source: Source) -> Decision:
    name = _SECTIONS[role]
    section = document.get(name)
    if section is not None and not isinstance(section, dict):
        raise source.error(name, f"must be a section of keys, is {shown(section)}")
    own, notes = collect(section or {}, SECTION_KEYS, source, at=name)
    found = inherit(inherited, own, SECTION_KEYS, source)
    decision = decide(found, SECTION_KEYS, source)
    decision.notes[:0] = notes
    if decision.fields.get("urls"):
        decision = _without_engine_arguments(name, found, source)
    _check_counts(role, decision, source)
    return decision


def _without_engine_arguments(section: str, found: list[Found], source: Source) -> Decision:
    """Servers with urls run already, under their own flags; what the file says about their engines is a description."""
    ours = [item for item in found if item.name not in SERVER_KEYS or item.name == "model"]
    theirs = [item for item in found if item not in ours and item.value not in SERVER_KEYS[item.name].harmless]
    named = dict.fromkeys(item.path.removeprefix(f"{section}.").partition(".")[0] for item in theirs)
    decision = decide(ours, SECTION_KEYS, source)
    if named:
        text = "no effect on servers with urls, which run already: say it in their own --config or flags"
        decision.notes.append(f"{section}: {', '.join(named)}: {text}")
    return decision


def _check_counts(role: str, decision: Decision, source: Source) -> None:
    at = f"{_SECTIONS[role]}.num_instances"
    urls: Any = decision.fields.get("urls", ())
    count: Any = decision.fields.setdefault("num_instances", len(urls) or 1)
    if role == "generation" and count < 1:
        raise source.error(at, f"must be at least 1, is {count}")
    if urls and len(urls) != count:
        raise source.error(at, f"is {count}, but urls names {len(urls)}")


def _check_no_mixed_server(decisions: Mapping[str, Decision], source: Source) -> None:
    context_urls: Any = decisions["context"].fields.get("urls", ())
    generation_urls: Any = decisions["generation"].fields.get("urls", ())
    for url in generation_urls:
        if url in context_urls:
            reason = "a server has one role; a generation server does both when context_servers.num_instances is 0"
            raise source.error("generation_servers.urls", f"{url} is also in context_servers.urls: {reason}")


def _model(decisions: Mapping[str, Decision], source: Source) -> str | None:
    models: dict[str, Any] = {role: decision.fields.get("model") for role, decision in decisions.items()}
    if models["context"] and models["generation"] and models["context"] != models["generation"]:
        text = f"is {shown(models['generation'])}, but context_servers.model is {shown(models['context'])}"
        raise source.error("generation_servers.model", f"{text}; both must serve one model")
    model = models["context"] or models["generation"]
    starts_some = any(not d.fields.get("urls") and d.fields["num_instances"] for d in decisions.values())
    if model is None and starts_some:
        raise source.error("model", "is missing: servers without urls are started here, and must be told what to load")
    return str(model) if model else None


def _pool(role: str, decision: Decision, template: ServerConfig) -> PoolConfig:
    fields: dict[str, Any] = dict(decision.fields)
    args = {name.removeprefix(_ROUTER): fields.pop(name) for name in list(fields) if name.startswith(_ROUTER)}
    router = RouterConfig(type=args.pop("type", RouterConfig().type), args=args)
    num_instances, urls = fields.pop("num_instances"), fields.pop("urls", ())
    return PoolConfig(
        num_instances=num_instances,
        urls=urls,
        router=router,
        server=fill(template, {**fields, "role": role, "model": template.model}),
        spread_threads="num_threads" not in fields and "cpu_affinity" not in fields,
    )


def _unique(lines: list[str]) -> tuple[str, ...]:
    """An inherited key is decided once for each section, and told once."""
    return tuple(dict.fromkeys(lines))
