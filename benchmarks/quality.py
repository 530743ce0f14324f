"""What each precision costs: the likelihood of a text that nothing was tuned on, and how often the next token changes.

python -m benchmarks.quality [MODEL]

The text is Python's own reference, which comes with Python: prose, tables and code. It is read in windows of a context
each, through the engine's own runner, prefill chunk and KV pool. Decode gives the very bits of prefill, whatever the
batch and the chunks (tests/unit/engine/test_exactness.py), so what is seen here is what a client is served.
"""

from __future__ import annotations

import argparse
import dataclasses
import pydoc_data.topics
import textwrap
from collections.abc import Iterator, Sequence
from typing import Final

import torch

from benchmarks import report
from disaggregated import model_files
from disaggregated.config.server import KVCacheConfig, ServerConfig
from disaggregated.engine.api import ScheduledSequence
from disaggregated.engine.load import LoadedEngine, load_engine
from disaggregated.sampling_params import SamplingParams
from disaggregated.text import Tokenizer

WINDOW: Final = 512
"""Tokens; each is predicted from those before it in its window."""
NLL_BAR: Final = 0.02
AGREEMENT_BAR: Final = 0.9


@dataclasses.dataclass(frozen=True, slots=True)
class Mode:
    weights: str
    kv: str
    is_promised: bool = True

    def __str__(self) -> str:
        return f"{self.weights} weights, {self.kv} KV"


BASELINE: Final = Mode("float32", "float32")
MODES: Final = (
    BASELINE,
    Mode("float32", "float16"),
    Mode("float32", "bfloat16"),
    Mode("float32", "int8"),
    Mode("float32", "fp8", is_promised=False),
    Mode("bfloat16", "bfloat16"),
    Mode("int8", "float32"),
    Mode("int8", "float16"),
    Mode("int8", "int8"),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Reading:
    """Of every predicted token, in order."""

    nll: torch.Tensor
    """Negative log likelihood, in nats."""
    best: torch.Tensor
    """The token that greedy sampling takes."""
    ops_name: str


def windows(model: str, count: int) -> list[list[int]]:
    """`count` windows, evenly spread over the text."""
    topics: dict[str, str] = pydoc_data.topics.topics
    text = "\n\n".join(textwrap.dedent(topics[name]) for name in sorted(topics))
    token_ids = Tokenizer.load(model_files.resolve(model).path).encode(text)
    stride = (len(token_ids) - WINDOW) // max(1, count - 1)
    return [token_ids[i * stride : i * stride + WINDOW] for i in range(count)]


def load(model: str, mode: Mode) -> LoadedEngine:
    pool = KVCacheConfig(dtype=mode.kv, max_tokens=WINDOW)
    config = ServerConfig(model=model, role="generation", dtype=mode.weights, device="cpu", kv_cache_config=pool)
    return load_engine(config, allocate=lambda layout: bytearray(layout.pool_bytes))


def read(loaded: LoadedEngine, texts: Sequence[Sequence[int]]) -> Reading:
    nll, best = [], []
    for logits, targets in zip(all_logits(loaded, texts), texts, strict=True):
        predicted = logits[:-1].float()
        nll.append(torch.nn.functional.cross_entropy(predicted, torch.tensor(targets[1:]), reduction="none"))
        best.append(predicted.argmax(-1))
    return Reading(torch.cat(nll), torch.cat(best), loaded.ops_name)


def all_logits(loaded: LoadedEngine, texts: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
    """(tokens, V) of each text: a runner gives logits after every draft, so all but the first token are drafts."""
    for token_ids in texts:
        yield loaded.runner.logits(
            [
                ScheduledSequence(
                    request_id="text",
                    token_ids=token_ids[:1],
                    draft_token_ids=token_ids[1:],
                    first_position=0,
                    block_table=list(range(loaded.layout.num_blocks_for(len(token_ids)))),
                    sampling=SamplingParams(max_tokens=1),
                )
            ]
        )


def row(mode: Mode, reading: Reading, baseline: Reading) -> report.Row:
    more = reading.nll - baseline.nll
    worse, error = float(more.mean()), float(more.std() / len(more) ** 0.5)
    agreement = float((reading.best == baseline.best).float().mean())
    seen = (
        f"NLL {float(reading.nll.mean()):.4f}, {worse:+.4f} ± {error:.4f}; "
        f"same next token {agreement:.1%} ({reading.ops_name})"
    )
    bar = f"at most +{NLL_BAR}, at least {AGREEMENT_BAR:.0%}" if mode is not BASELINE and mode.is_promised else ""
    holds = worse <= NLL_BAR and agreement >= AGREEMENT_BAR if bar else None
    return report.Row(what=str(mode), seen=seen, bar=bar, holds=holds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--windows", type=int, default=12)
    arguments = parser.parse_args()
    texts = windows(arguments.model, arguments.windows)
    baseline = read(load(arguments.model, BASELINE), texts)
    rows = [row(BASELINE, baseline, baseline)]
    for mode in MODES[1:]:
        rows.append(row(mode, read(load(arguments.model, mode), texts), baseline))
        print(rows[-1], flush=True)
    report.write("quality", "Precision against float32", rows, notes(arguments.model, texts))


def notes(model: str, texts: Sequence[Sequence[int]]) -> str:
    return (
        f"{model}; {sum(map(len, texts))} tokens of Python's reference in {len(texts)} windows of {WINDOW}; nothing "
        "was calibrated on it or on any text.\n"
        "NLL: negative log likelihood a token, in nats, and its mean difference to float32 with the standard error.\n"
        "Decode has the bits of prefill in each of these modes, so this is the quality of both servers."
    )


if __name__ == "__main__":
    main()
