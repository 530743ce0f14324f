"""Clients of other people against a whole deployment, as they come: what each is used for most, and that it says so."""

from __future__ import annotations

import json
import pathlib
from collections.abc import AsyncIterator
from typing import Any, Final

import pytest
import pytest_asyncio
import yaml

from disaggregated.model_files import resolve
from tests.support.deployment import Deployment, deployed, is_idle
from tests.support.front_door import front_door
from tests.support.stock_clients.environment import StockClients

MODEL: Final = "SmolLM2-135M-Instruct"
EXCLUDED_CHECKS: Final = "positive_data_acceptance,negative_data_rejection,ensure_resource_availability"
"""Schemathesis cannot know that a prompt of the right type is too long, that a field only counts beside another one, or
that `store` was false."""

pytestmark = [pytest.mark.soak, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def clients() -> StockClients:
    return StockClients.ready()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def deployment(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Deployment]:
    section = {"num_instances": 1, "max_num_tokens": 256, "max_seq_len": 640, "kv_cache_config": {"max_tokens": 8192}}
    document = {
        "model": MODEL.lower(),
        "context_servers": section,
        "generation_servers": {**section, "router": {"type": "load_balancing"}},
    }
    folder: pathlib.Path = tmp_path_factory.mktemp("deployment")
    async with deployed(folder, document) as running:
        yield running


async def test_openai(clients: StockClients, deployment: Deployment) -> None:
    told = await clients.run_script("with_openai", deployment.api, MODEL)
    assert "Paris" in told["text"]
    assert told["streamed"] == told["text"]
    assert told["city"] is not None
    assert (told["call"], told["finish_reason"]) == ("weather", "tool_calls")
    assert isinstance(json.loads(told["arguments"]), dict)
    assert told["response"]
    assert told["last_event"] in ("response.completed", "response.incomplete")
    assert told["logprobs"] == 4 + 3
    assert told["models"]


async def test_langchain_openai(clients: StockClients, deployment: Deployment) -> None:
    told = await clients.run_script("with_langchain", deployment.api, MODEL)
    assert "Paris" in told["text"]
    assert told["streamed"] == told["text"]
    assert told["usage"] > 10
    assert told["city"]
    assert set(told["calls"]) == {"weather"}
    assert told["response"]
    assert told["completed"]
    assert told["batch"] == 2


async def test_litellm(clients: StockClients, deployment: Deployment) -> None:
    told = await clients.run_script("with_litellm", deployment.api, MODEL)
    assert "Paris" in told["text"]
    assert told["streamed"] == told["text"]
    assert told["json"].lstrip().startswith("{")
    assert told["completed"]
    assert told["response"]


async def test_instructor(clients: StockClients, deployment: Deployment) -> None:
    told = await clients.run_script("with_instructor", deployment.api, MODEL)
    assert set(told) == {"JSON_SCHEMA", "TOOLS", "TOOLS_STRICT"}
    for name, inhabitants in told.values():
        assert name
        assert isinstance(inhabitants, int)


async def test_lm_eval(clients: StockClients, deployment: Deployment, tmp_path: pathlib.Path) -> None:
    """Multiple choice, by the likelihood of each answer after the question: echo, logprobs and no new tokens."""
    cities = [("France", "Paris"), ("Italy", "Rome"), ("Germany", "Berlin"), ("Spain", "Madrid"), ("Japan", "Tokyo")]
    questions = [{"q": country, "choices": [f" {c}" for _, c in cities], "a": f" {city}"} for country, city in cities]
    (tmp_path / "capitals.jsonl").write_text("\n".join(map(json.dumps, questions)))
    task = {
        "task": "capitals", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "capitals.jsonl")}},
        "doc_to_text": "The capital of {{q}} is", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{choices.index(a)}}",
        "target_delimiter": "", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "capitals.yaml").write_text(yaml.safe_dump(task))
    tokenizer = resolve(MODEL.lower(), weights=False).path
    model_args = f"model={MODEL},base_url={deployment.api}/completions,tokenizer={tokenizer},num_concurrent=2"
    await clients.run(
        "lm_eval", "run", "--model", "local-completions", "--model_args", model_args, "--tasks", "capitals",
        "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"), timeout_s=300,
    )  # fmt: skip
    (results,) = (tmp_path / "out").rglob("results_*.json")
    accuracy = json.loads(results.read_text())["results"]["capitals"]["acc,none"]
    assert accuracy >= 0.8, accuracy


async def test_aiperf(clients: StockClients, deployment: Deployment, tmp_path: pathlib.Path) -> None:
    """The load tool of the field: streamed chats, its own tokenizer, its own counts. Told to stay offline, it would
    take a tokenizer from its cache only, not from a folder."""
    tokenizer = resolve(MODEL.lower(), weights=False).path
    await clients.run(
        "aiperf", "profile", "--model", MODEL, "--url", deployment.url, "--endpoint-type", "chat", "--streaming",
        "--tokenizer", str(tokenizer), "--request-count", "12", "--concurrency", "3", "--ui", "none",
        "--synthetic-input-tokens-mean", "40", "--output-tokens-mean", "8", "--artifact-dir", str(tmp_path / "out"),
        timeout_s=300, HF_HUB_OFFLINE="",
    )  # fmt: skip
    (report,) = (tmp_path / "out").rglob("profile_export_aiperf.json")
    told: dict[str, Any] = json.loads(report.read_text())
    assert told["request_count"]["avg"] == 12
    assert not told.get("error_request_count") or told["error_request_count"]["avg"] == 0
    assert told["time_to_first_token"]["avg"] > 0


async def test_guidellm(deployment: Deployment, tmp_path: pathlib.Path) -> None:
    """The other load tool: it counts whatever is not a whole stream of what it asked for as an error."""
    clients = StockClients.with_guidellm()
    if clients is None:
        pytest.skip("DISAGG_GUIDELLM names no environment with guidellm")
    tokenizer = resolve(MODEL.lower(), weights=False).path
    await clients.run(
        "guidellm", "run", "--backend", f"kind=openai_http,target={deployment.url},model={MODEL}",
        "--profile", "kind=concurrent,streams=3", "--constraint", "kind=max_requests,count=9",
        "--tokenizer", f"kind=huggingface_auto,model={tokenizer}",
        "--data", "kind=synthetic_text,prompt_tokens=40,output_tokens=8",
        "--output", f"kind=json,path={tmp_path / 'out.json'}", "--disable-progress",
        timeout_s=300,
    )  # fmt: skip
    (benchmark,) = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert not requests["errored"], requests["errored"][0]["info"]["error"]
    assert len(requests["successful"]) == 9
    assert all(one["output_metrics"]["text_tokens"] == 8 for one in requests["successful"])


async def test_schemathesis(clients: StockClients) -> None:
    """From the document of the front door itself: good bodies, bad ones, one call after another. Fake servers behind
    it, because a good body may ask for 128 replies of any length."""
    async with front_door(num_tokens_max=96, num_generation=2) as door:
        await clients.run(
            "st", "run", f"{door.url}/openapi.json", "--max-examples", "30", "--workers", "1", "--seed", "1",
            "--exclude-path", "/cluster/scale", "--exclude-checks", EXCLUDED_CHECKS, timeout_s=1800,
        )  # fmt: skip
        await door.wait_idle()


async def test_afterwards_nothing_is_held_anywhere(deployment: Deployment) -> None:
    left = await deployment.wait_idle(timeout_s=5.0)
    assert is_idle(left), left
