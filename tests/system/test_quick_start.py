"""What a newcomer and a TensorRT-LLM user type first, as they type it, with free ports in place of the fixed ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import aiohttp

from tests.support.completions import complete
from tests.support.processes import ROOT, all_running, spawned

MODEL: Final = "smollm2-135m-instruct"
FILES: Final = ROOT / "configs" / "trtllm-quickstart"
SIZES: Final = ("--max_seq_len", "512", "--kv_cache_config.max_tokens", "2048")


def serve(role: str, config: str) -> list[str]:
    flags = ["--host", "localhost", "--port", "0", "--backend", "pytorch", "--config", str(FILES / config), *SIZES]
    return [
        "-m",
        "orchestrator",
        "serve",
        *([role, MODEL] if role == "context" else [MODEL, "--server_role", role]),
        *flags,
    ]


async def test_the_three_commands_of_a_tensorrt_llm_quick_start_serve(tmp_path: Path) -> None:
    commands = [serve("context", "context_config.yml")] * 2 + [serve("generation", "generation_config.yml")]
    async with all_running(commands) as (first, second, generation):
        path = tmp_path / "disagg-config.yml"
        text = (FILES / "disagg-config.yml").read_text().replace("port: 8000", "port: 0")
        for port, server in ((8001, first), (8002, second), (8003, generation)):
            text = text.replace(f'"localhost:{port}"', f'"localhost:{server.port}"')
        path.write_text(text)
        async with spawned("-m", "orchestrator", "-c", str(path)) as orchestrator:
            line = await orchestrator.wait_line("^READY orchestrator ")
            url = f"http://{line.split()[2]}"
            for event in ("server_joined role=context", "server_joined role=generation", "model_loaded"):
                await orchestrator.wait_line(event)
            async with aiohttp.ClientSession() as session:
                answer = await complete(session, url, [1, 2, 3], max_tokens=4, model=MODEL)
                assert len(answer.token_ids) == 4
            status = await output("-m", "orchestrator", "status", "--url", url)
            assert status[0] == f"{url}: serving"
            refused = await output("-m", "orchestrator", "scale", "context=1", "--url", url, code=1)
            assert refused == ["disaggregated: the context servers have urls and are run by somebody else"]
            orchestrator.process.terminate()
            assert await orchestrator.wait_exit() == 0


async def test_the_demo_shows_an_answer_and_how_it_was_served() -> None:
    lines = await output("-m", "orchestrator", "demo", "--max-tokens", "8")
    text = "\n".join(lines)
    assert re.search(r"^ready after .* an orchestrator and 2 servers", text, re.MULTILINE)
    for step in ("prefill", "KV transfer", "decode, 8 tokens", "first token", "stopped, with every server"):
        assert step in text


async def output(*arguments: str, code: int = 0) -> list[str]:
    async with spawned(*arguments) as command:
        assert await command.wait_exit(250) == code, command.words()
        return command.stdout + command.stderr
