"""What is measured of every engine, and how a measuring process tells its parent.

Runs under the interpreters of peers too: standard library only, and nothing newer than Python 3.10.
"""

from __future__ import annotations

import dataclasses
import json
import random
import statistics
import time

PREFILL_LENGTHS = (512, 2048)
BATCH_SIZES = (1, 8, 32)
CONTEXT_LEN = 512
DECODE_STEPS = 24
PREFIX = "MEASURED "


@dataclasses.dataclass
class Measurement:
    """Seconds, each as often as it was measured. Keys are strings, because JSON has no others."""

    system: str
    threads: int
    prefill: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """Prompt length → seconds to the first token of one prompt."""
    decode: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """Batch size → seconds a step, each sequence being `CONTEXT_LEN` tokens long at first."""
    weight_bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    """What a decode step reads of weights, by the form they are held in; empty where a system does not tell."""

    def tell(self) -> None:
        """To the parent process, which looks for the last such line on stdout."""
        print(PREFIX + json.dumps(dataclasses.asdict(self)), flush=True)

    def prefill_s(self, length: int) -> float:
        return statistics.median(self.prefill[str(length)])

    def decode_s(self, batch_size: int) -> float:
        return statistics.median(self.decode[str(batch_size)])

    def add(self, other: Measurement) -> None:
        """More of the same system."""
        for mine, theirs in ((self.prefill, other.prefill), (self.decode, other.decode)):
            for key, seconds in theirs.items():
                mine.setdefault(key, []).extend(seconds)


def told(stdout: str) -> Measurement | None:
    lines = [line for line in stdout.splitlines() if line.startswith(PREFIX)]
    return Measurement(**json.loads(lines[-1][len(PREFIX) :])) if lines else None


def random_prompt(length: int, seed: int) -> list[int]:
    """Token ids that every vocabulary of a useful model has. No two that differ in seed or length share a prefix:
    an engine that caches prefixes would otherwise find a quarter of a prompt of 2,048 in one of 512."""
    generator = random.Random(f"{length} {seed}")
    return [generator.randrange(1000, 30000) for _ in range(length)]


def say(message: str) -> None:
    """Progress, for whoever waits."""
    print(f"   {time.strftime('%H:%M:%S')} {message}", flush=True)
