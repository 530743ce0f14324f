"""Servers of a tiny model with random weights: real processes that start in a second and compute in milliseconds.

`brisk` decodes thousands of tokens a second. `slow` takes some milliseconds for a chunk, so a test that hears of the
first chunk of a long prompt can do something before the last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import random
from collections.abc import AsyncIterator, Sequence
from typing import Final

from tests.support.processes import ServerProcess, all_running, running
from tests.support.server_client import ContextClient, GenerationClient

VOCAB_SIZE: Final = 503
_BRISK: Final = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}
_SLOW: Final = {"hidden_size": 512, "num_hidden_layers": 12, "intermediate_size": 1024}


def write_model(folder: pathlib.Path, *, slow: bool = False) -> pathlib.Path:
    """A directory with just a config.json: weights are made up at start, the same in every process."""
    path = folder / ("slow" if slow else "brisk")
    path.mkdir(exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB_SIZE,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        **(_SLOW if slow else _BRISK),
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def arguments(role: str, model: pathlib.Path, *flags: str) -> list[str]:
    """Of `python`; the flags given come last, so they win."""
    return [
        "-m",
        f"{role}_server",
        str(model),
        "--load-format=dummy",
        "--port=0",
        "--max-num-tokens=64",
        "--kv-cache-config.max-tokens=8192",
        "--kv-cache-config.tokens-per-block=16",
        *flags,
    ]


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """A context and a generation server, and who speaks to them."""

    context_process: ServerProcess
    generation_process: ServerProcess
    context: ContextClient
    generation: GenerationClient

    async def wait_idle(self) -> None:
        """Every block of both is back."""
        await self.generation.wait_idle()
        await self.context.wait_idle()


@contextlib.asynccontextmanager
async def server_pair(
    model: pathlib.Path, *flags: str, context_flags: Sequence[str] = (), generation_flags: Sequence[str] = ()
) -> AsyncIterator[Pair]:
    commands = [
        arguments("context", model, *flags, *context_flags),
        arguments("generation", model, *flags, *generation_flags),
    ]
    async with (
        all_running(commands) as [context_process, generation_process],
        ContextClient(context_process.address) as context,
        GenerationClient(generation_process.address) as generation,
    ):
        yield Pair(context_process, generation_process, context, generation)


@contextlib.asynccontextmanager
async def generation_server(model: pathlib.Path, *flags: str) -> AsyncIterator[tuple[ServerProcess, GenerationClient]]:
    async with (
        running(*arguments("generation", model, *flags)) as server,
        GenerationClient(server.address) as client,
    ):
        yield server, client


def random_prompt(num_tokens: int, seed: int = 0) -> list[int]:
    dice = random.Random(f"{num_tokens}-{seed}")
    return [dice.randrange(3, VOCAB_SIZE) for _ in range(num_tokens)]
