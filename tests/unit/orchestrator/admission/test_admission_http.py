"""What a client of the front door sees of keys, quotas, limits and deadlines."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from disaggregated.config.door import DoorConfig
from tests.support.fake_cluster import Temper
from tests.support.front_door import Door, front_door, until

TEXT = "/v1/completions"
USER, OPERATOR, POOR = "sk-user-0123456789", "sk-operator-0123456", "sk-poor-0123456789"
SLOW = Temper(latency_s=0.0, step_s=0.02, prefill_token_s=0.0, max_batch_size=1)


def body(**fields: Any) -> dict[str, Any]:
    return {
        "model": "fake",
        "prompt": "hello",
        "max_tokens": 4,
        "temperature": 0,
        "seed": 4,
        "ignore_eos": True,
    } | fields


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
def keys(tmp_path: Path) -> DoorConfig:
    path = tmp_path / "keys.yml"
    path.write_text(
        f"keys:\n- {{name: user, key: {USER}, best_priority: 0}}\n- {{name: boss, key: {OPERATOR}, operator: true}}\n"
        f"- {{name: poor, key: {POOR}, requests_per_minute: 2, tokens_per_minute: 60000, models: [other]}}\n"
    )
    path.chmod(0o600)
    return DoorConfig(api_keys_file=str(path))


async def error_of(answer: aiohttp.ClientResponse) -> dict[str, Any]:
    error = (await answer.json())["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)


async def test_with_keys_nothing_is_served_without_one_but_probes(keys: DoorConfig) -> None:
    async with front_door(door=keys) as door:
        async with door.http.post(door.url + TEXT, json=body()) as answer:
            assert answer.status == 401
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            assert "x-request-id" in answer.headers
            assert (await error_of(answer))["code"] == "invalid_api_key"
        async with door.http.post(door.url + TEXT, json=body(), headers=bearer(USER + "x")) as answer:
            assert answer.status == 401
        for path in ("/health", "/metrics", "/version"):
            async with door.http.get(door.url + path) as answer:
                assert answer.status == 200
        async with door.http.post(door.url + TEXT, json=body(), headers=bearer(USER)) as answer:
            assert answer.status == 200
            request_id = answer.headers["x-request-id"]
        for key, status in ((USER, 403), (OPERATOR, 200)):
            async with door.http.get(f"{door.url}/requests/{request_id}", headers=bearer(key)) as answer:
                assert answer.status == status
                story = await answer.json()
        assert story["tenant"] == "user"


async def test_a_key_sees_only_its_models_and_asks_only_for_them(keys: DoorConfig) -> None:
    async with front_door(door=keys) as door:
        for key, names in ((USER, ["house/fake"]), (POOR, [])):
            async with door.http.get(f"{door.url}/v1/models", headers=bearer(key)) as answer:
                assert [model["id"] for model in (await answer.json())["data"]] == names
        async with door.http.post(door.url + TEXT, json=body(), headers=bearer(POOR)) as answer:
            assert answer.status == 404
            assert (await error_of(answer))["param"] == "model"


async def test_a_priority_that_is_too_good_for_the_key_is_named(keys: DoorConfig) -> None:
    async with front_door(door=keys) as door:
        status, answer = await door.post(TEXT, body(priority=-1), headers=bearer(USER))
        assert (status, answer["error"]["param"]) == (400, "priority")


async def test_a_quota_that_is_used_up_is_429_and_says_when_to_come_back(keys: DoorConfig, tmp_path: Path) -> None:
    path = tmp_path / "keys.yml"
    path.write_text(path.read_text().replace("models: [other]", "models: [fake]"))
    path.chmod(0o600)
    async with front_door(door=keys) as door:
        begin_s = time.monotonic()
        for left in (1, 0):
            async with door.http.post(door.url + TEXT, json=body(), headers=bearer(POOR)) as answer:
                assert answer.status == 200
                assert answer.headers["x-ratelimit-remaining-requests"] == str(left)
                assert int(answer.headers["x-ratelimit-remaining-tokens"]) >= 60_000 - 100
        async with door.http.post(door.url + TEXT, json=body(), headers=bearer(POOR)) as answer:
            assert answer.status == 429
            assert 29 - (time.monotonic() - begin_s) <= int(answer.headers["Retry-After"]) <= 30
            assert (await error_of(answer))["code"] == "rate_limit_exceeded"


async def test_a_key_that_is_struck_out_is_no_longer_served(keys: DoorConfig, tmp_path: Path) -> None:
    path = tmp_path / "keys.yml"
    async with front_door(door=keys) as door:
        path.write_text(path.read_text().replace(USER, USER + "-new"))

        async def status() -> int:
            async with door.http.post(door.url + TEXT, json=body(), headers=bearer(USER)) as answer:
                return answer.status

        while await status() == 200:  # noqa: ASYNC110 - the file is looked at once a second
            await asyncio.sleep(0.05)
        assert await status() == 401


async def test_prompts_and_bodies_have_the_limits_of_the_file() -> None:
    limits = DoorConfig(prompt_tokens_max=10, body_bytes_max=2000)
    async with front_door(door=limits) as door:
        status, answer = await door.post(TEXT, body(prompt="x" * 11))
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        assert "has 11 tokens, the limit here is 10" in answer["error"]["message"]
        status, answer = await door.post(TEXT, body(prompt="x" * 2000))
        assert status == 413
        assert "2000 bytes" in answer["error"]["message"]
        assert (await door.post(TEXT, body(prompt="x" * 10)))[0] == 200


async def test_a_timeout_in_a_header_ends_the_request_and_an_odd_one_is_named() -> None:
    async with front_door(temper=SLOW) as door:
        timeout = {"x-request-timeout": "0.2"}
        status, answer = await door.post(TEXT, body(max_tokens=500), headers=timeout)
        assert (status, answer["error"]["type"]) == (504, "timeout_error")
        status, answer = await door.post(TEXT, body(), headers={"x-request-timeout": "soon"})
        assert (status, answer["error"]["param"]) == (400, "x-request-timeout")
        await door.wait_idle()


async def test_objectives_are_counted_as_met_or_missed() -> None:
    async with front_door(temper=SLOW) as door:
        headers = {"x-slo-ttft-ms": "60000", "x-slo-tpot-ms": "0.01"}
        assert (await door.post(TEXT, body(), headers=headers))[0] == 200
        text = door.door.metrics.render().decode()
        assert 'disagg_slo_requests_total{objective="ttft",outcome="met"} 1.0' in text
        assert 'disagg_slo_requests_total{objective="tpot",outcome="missed"} 1.0' in text
        assert 'objective="timeout"' not in text


async def test_one_tenant_cannot_fill_the_queue_and_is_told_so_alone() -> None:
    async with front_door(temper=SLOW, door=DoorConfig(tenant_queue_depth_max=2)) as door:
        queue = door.door.dispatcher.queue
        long = [asyncio.create_task(door.post(TEXT, body(max_tokens=15, user="ann"))) for _ in range(3)]
        await until(lambda: queue.num_waiting_of("ann") == 2)
        status, answer = await door.post(TEXT, body(user="ann"))
        assert status == 429
        assert "2 of your requests wait already" in answer["error"]["message"]
        other = asyncio.create_task(door.post(TEXT, body(user="bob")))
        await until(lambda: queue.num_tenants == 2)
        for task in [*long, other]:
            assert (await task)[0] == 200


async def test_a_full_queue_is_told_before_the_prompt_is_looked_at() -> None:
    async with front_door(temper=SLOW, queue_depth_max=1) as door:
        running = [asyncio.create_task(door.post(TEXT, body(max_tokens=15))) for _ in range(2)]
        await until(lambda: len(door.door.dispatcher.queue) == 1)
        async with door.http.post(door.url + TEXT, json=body(prompt=[99_999_999])) as answer:
            assert answer.status == 429, "its prompt is wrong, and nobody has looked"
            assert int(answer.headers["Retry-After"]) >= 1
        for task in running:
            assert (await task)[0] == 200


async def test_what_comes_to_nothing_costs_no_tokens(keys: DoorConfig, tmp_path: Path) -> None:
    path = tmp_path / "keys.yml"
    path.write_text(path.read_text().replace("models: [other]", "models: [fake]").replace("minute: 2", "minute: 99"))
    path.chmod(0o600)

    async def left(door: Door) -> int:
        async with door.http.post(door.url + TEXT, json=body(), headers=bearer(POOR)) as answer:
            return int(answer.headers["x-ratelimit-remaining-tokens"])

    async with front_door(door=keys) as door:
        await left(door)
        before = await left(door)
        for wrong in (body(prompt=["fine", "x" * 5000]), body(prompt="x" * 5000)):
            assert (await door.post(TEXT, wrong, headers=bearer(POOR)))[0] == 400
        status, _ = await door.post(
            TEXT, body(max_tokens=500, n=3), headers=bearer(POOR) | {"x-request-timeout": "0.1"}
        )
        assert status in (503, 504), "the second and third may not even be begun"
        await door.wait_idle()
        assert await left(door) >= before - 2000, "what was generated in vain, and no more"
