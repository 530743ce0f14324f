"""Keys about text, which is the front door's: how replies are taken apart, and whose chat templates are run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from disaggregated.config.key_table import honoured, no_effect
from disaggregated.config.kinds import BOOLEAN, shown
from disaggregated.config.parser_names import REASONING_PARSER, TOOL_PARSER

if TYPE_CHECKING:
    from disaggregated.config.reader import Source

_AUTO: Final = "auto: the model's own, by its chat template; none: they stay text."

TEXT_KEYS: Final = (
    honoured("tool_parser", TOOL_PARSER, f"How tool calls are found in a reply. {_AUTO}"),
    honoured("reasoning_parser", REASONING_PARSER, f"How reasoning is found in a reply. {_AUTO}"),
    honoured(
        "allow_request_chat_template",
        BOOLEAN,
        "Requests may bring a chat_template of their own. It is a program: it runs in a sandbox, for at most a second.",
    ),
)

SERVER_TEXT_KEYS: Final = (
    no_effect("tool_parser", TOOL_PARSER, "text is the orchestrator's; there the key is honoured"),
    no_effect("reasoning_parser", REASONING_PARSER, "text is the orchestrator's; there the key is honoured"),
)

_SPELLINGS: Final = {"tool_call_parser": "tool_parser"}
_LIFTED: Final = ("tool_parser", "reasoning_parser", "tool_call_parser")


def lift_text_keys(document: Mapping[str, object], source: Source) -> dict[str, object]:
    """The document with a section's parsers at the top, where the orchestrator's keys stand.

    Engine arguments may stand in either section, and to TensorRT-LLM these are two of them.

    Raises:
        ConfigError: two places say different things.
    """
    lifted = dict(document)
    for name, place in list(lifted.items()):
        if isinstance(place, dict) and name in ("context_servers", "generation_servers"):
            lifted[name] = {key: value for key, value in place.items() if key not in _LIFTED}
            _merge(lifted, {key: value for key, value in place.items() if key in _LIFTED}, name, source)
    if "tool_call_parser" in lifted:
        _merge(lifted, {"tool_call_parser": lifted.pop("tool_call_parser")}, "", source)
    return lifted


def _merge(top: dict[str, object], found: Mapping[str, object], section: str, source: Source) -> None:
    for key, value in found.items():
        name = _SPELLINGS.get(key, key)
        if top.setdefault(name, value) != value:
            at = f"{section}.{key}" if section else key
            raise source.error(at, f"is {shown(value)}, but {name} is {shown(top[name])}")
