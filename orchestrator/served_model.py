"""What the orchestrator itself needs of the model: its names, its tokenizer, its sampling defaults. No weights."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Final

from disaggregated.model_files import read_num_tokens_max, resolve
from disaggregated.model_files.sampling_defaults import read_sampling_defaults
from disaggregated.text import Tokenizer
from orchestrator.freed_memory import give_back_freed_memory

TOKENS_READ_MAX: Final = 1 << 18


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    name: str
    """In full, as servers describe it."""
    aliases: tuple[str, ...]
    """Other names that clients may use; the basename is one of them."""
    tokenizer: Tokenizer
    num_tokens_max: int
    """The model's own limit; servers may have a lower one."""
    sampling_defaults: Mapping[str, float]
    """What generation_config.json says where a client says nothing."""
    created: int
    """Seconds since 1970, for `/v1/models`."""

    @classmethod
    def load(cls, name: str) -> ServedModel:
        """Reads files; takes a fraction of a second, so call it on a thread.

        Raises:
            ModelUnavailable: names the file that is missing or wrong.
        """
        files = resolve(name, weights=False)
        tokenizer = Tokenizer.load(files.path)
        tokenizer.learn_texts()
        model = cls(
            name=files.name,
            aliases=files.aliases,
            tokenizer=tokenizer,
            num_tokens_max=read_num_tokens_max(files.path),
            sampling_defaults=read_sampling_defaults(files.path),
            created=int(time.time()),
        )
        give_back_freed_memory()
        return model

    @property
    def num_tokens_read_max(self) -> int:
        """Of a text that is only counted, or cut afterwards: it may be longer than what the model takes."""
        return max(self.num_tokens_max, TOKENS_READ_MAX)

    def is_meant_by(self, name: str) -> bool:
        return name == self.name or name in self.aliases
