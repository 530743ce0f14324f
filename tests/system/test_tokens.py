"""Tokens are the oracle: whatever transport, chunking and company, a sequence is what one process makes of it."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import aiohttp
import pytest

from benchmarks import report
from disaggregated import model_files
from disaggregated.sampling_params import SamplingParams
from disaggregated.text import Tokenizer
from tests.support.completions import complete
from tests.support.deployment import deployed, is_idle
from tests.support.oracle import OneProcess
from tests.support.prompts import Prompt, forty_prompts

MODEL: Final = "smollm2-135m-instruct"
NUM_NEW: Final = 64
GREEDY: Final[Mapping[str, Any]] = {"temperature": 0}
SEEDED: Final[Mapping[str, Any]] = {"temperature": 0.9, "top_p": 0.95, "top_k": 200, "min_p": 0.01, "seed": 20_26}

SAMPLINGS: Final = {"greedy": GREEDY, "seeded": SEEDED}

Tokens = dict[str, list[int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One deployment and one way to load it."""

    transport: str
    chunk_size: int
    num_together: int = 1
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=lambda: GREEDY)

    def __str__(self) -> str:
        company = "alone" if self.num_together == 1 else f"among {self.num_together - 1} others"
        return f"{self.transport}, chunks of {self.chunk_size}, {company}, {self.kind}"

    @property
    def kind(self) -> str:
        return "greedy" if self.sampling is GREEDY else "seeded"

    def document(self) -> dict[str, Any]:
        """Without block reuse: a second run of a prompt must travel again, not be found."""
        section = {
            "num_instances": 1,
            "max_num_tokens": self.chunk_size,
            "kv_cache_config": {"enable_block_reuse": False, "max_tokens": 24_576},
            "cache_transceiver_config": {"backend": self.transport},
        }
        return {"model": MODEL, "context_servers": section, "generation_servers": dict(section)}


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return forty_prompts(Tokenizer.load(model_files.resolve(MODEL).path))


@pytest.fixture(scope="module")
def oracle() -> OneProcess:
    return OneProcess(MODEL)


def expected(oracle: OneProcess, prompts: Iterable[Prompt], sampling: Mapping[str, Any], num_new: int) -> Tokens:
    params = SamplingParams(max_tokens=num_new, **sampling)
    return {prompt.name: oracle.generate(prompt.token_ids, params) for prompt in prompts}


async def observed(folder: pathlib.Path, setting: Setting, prompts: Sequence[Prompt], num_new: int) -> Tokens:
    """All prompts through a fresh deployment, `num_together` at a time; its ledger is empty at the end."""
    tokens: Tokens = {}
    queue = iter(prompts)

    async def work(session: aiohttp.ClientSession, url: str) -> None:
        for prompt in queue:
            completion = await complete(session, url, prompt.token_ids, max_tokens=num_new, **setting.sampling)
            tokens[prompt.name] = completion.token_ids

    async with deployed(folder, setting.document()) as deployment:
        async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
            for _ in range(setting.num_together):
                group.create_task(work(session, deployment.url))
        assert is_idle(left := await deployment.wait_idle()), left
    return tokens


def differing(seen: Tokens, wanted: Tokens) -> list[str]:
    assert seen.keys() == wanted.keys()
    return [name for name in wanted if seen[name] != wanted[name]]


async def test_a_few_prompts_give_the_tokens_of_one_process(
    prompts: list[Prompt], oracle: OneProcess, tmp_path: pathlib.Path
) -> None:
    """Over TCP: what all other deployments of the real model use is shared memory."""
    few = [*prompts[0:20:4], prompts[19]]
    setting = Setting(transport="TCP", chunk_size=64, num_together=4, sampling=SEEDED)
    assert not differing(await observed(tmp_path, setting, few, 12), expected(oracle, few, SEEDED, 12))


async def side_by_side(
    folder: pathlib.Path, chunk_size: int, num_together: int, sampling: Mapping[str, Any], prompts: Sequence[Prompt]
) -> list[tuple[Setting, Tokens]]:
    """Both transports at the same time: two deployments on one machine, which halves the wait."""
    settings = [
        Setting(transport=transport, chunk_size=chunk_size, num_together=num_together, sampling=sampling)
        for transport in ("SHM", "TCP")
    ]
    async with asyncio.TaskGroup() as group:
        running = []
        for setting in settings:
            own = folder / f"{setting.transport}-{chunk_size}-{num_together}-{setting.kind}"
            own.mkdir()
            running.append(group.create_task(observed(own, setting, prompts, NUM_NEW)))
    return [(setting, task.result()) for setting, task in zip(settings, running, strict=True)]


@pytest.mark.soak
@pytest.mark.timeout(5400)
async def test_all_forty_prompts_give_the_tokens_of_one_process(
    prompts: list[Prompt], oracle: OneProcess, tmp_path: pathlib.Path
) -> None:
    shapes = [(chunk_size, num_together, GREEDY) for chunk_size, num_together in itertools.product((64, 512), (1, 9))]
    shapes.append((512, 9, SEEDED))
    wanted = {kind: expected(oracle, prompts, sampling, NUM_NEW) for kind, sampling in SAMPLINGS.items()}
    rows, wrong = [], []
    for chunk_size, num_together, sampling in shapes:
        for setting, seen in await side_by_side(tmp_path, chunk_size, num_together, sampling, prompts):
            names = differing(seen, wanted[setting.kind])
            wrong += [f"{setting}: {name}" for name in names]
            same = f"{len(prompts) - len(names)} of {len(prompts)} the same"
            rows.append(report.Row(what=str(setting), seen=same, bar="40 of 40", holds=not names))
    report.write("tokens", "Disaggregated tokens against one process: 40 prompts, 64 new tokens each", rows)
    assert not wrong
