"""What `tool_parser` and `reasoning_parser` may be called. The parsers themselves are the orchestrator's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from disaggregated.config.kinds import Kind, choice

AUTO: Final = "auto"
NONE: Final = "none"

TOOL_PARSERS: Final = (
    "hermes", "llama3_json", "granite", "mistral", "deepseek_v3", "kimi_k2", "pythonic", "llama4_pythonic", "lfm2",
    "qwen3_coder", "glm45", "minimax_m2", "minimax", "harmony",
)  # fmt: skip
REASONING_PARSERS: Final = (
    "qwen3", "deepseek_v3", "glm45", "deepseek_r1", "nano_v3", "mistral", "seed_oss", "command_a",
)  # fmt: skip

_TOOL_SPELLINGS: Final[Mapping[str, str]] = {
    "qwen": "hermes", "qwen25": "hermes", "qwen3": "hermes", "llama3": "llama3_json", "llama4_json": "llama3_json",
    "llama4": "llama4_pythonic", "deepseekv3": "deepseek_v3", "deepseek_v31": "deepseek_v3",
    "deepseekv31": "deepseek_v3", "qwen3_xml": "qwen3_coder", "glm4": "glm45", "glm47": "glm45", "kimi": "kimi_k2",
    "gpt_oss": "harmony", "openai": "harmony", "openai_gptoss": "harmony",
}  # fmt: skip
_REASONING_SPELLINGS: Final[Mapping[str, str]] = {  # What reads gpt-oss' calls reads its reasoning too.
    "deepseek": "deepseek_r1", "deepseek_v31": "deepseek_v3", "glm4": "glm45", "qwen": "qwen3",
    "minimax_m2": "qwen3", "harmony": NONE, "gpt_oss": NONE, "openai_gptoss": NONE,
}  # fmt: skip


def _names(known: tuple[str, ...], spellings: Mapping[str, str]) -> Kind:
    """Other engines call the same formats otherwise, and write some with hyphens."""
    every = {**{name: name for name in known}, **spellings}
    hyphens = {name.replace("_", "-"): meant for name, meant in every.items()}
    return choice(AUTO, NONE, *known, spellings={**every, **hyphens})


TOOL_PARSER: Final = _names(TOOL_PARSERS, _TOOL_SPELLINGS)
REASONING_PARSER: Final = _names(REASONING_PARSERS, _REASONING_SPELLINGS)
