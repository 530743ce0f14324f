"""What one orchestrator is while its servers are elsewhere: small, as it loads only what it needs."""

from __future__ import annotations

import asyncio
import re
import signal
from pathlib import Path
from typing import Final

import psutil
import yaml

from tests.support.processes import spawned

RESIDENT_BYTES_MAX: Final = 105e6
"""It was 89 MB when this was written; 120 MB is what an operator may count on."""
IMPORTED: Final = re.compile(r"^import time:.*\| +(\S+)$")
NOT_NEEDED: Final = (
    "torch", "numpy", "ml_dtypes", "scipy", "transformers", "safetensors", "huggingface_hub", "kvtransfer",
    "disaggregated.engine", "disaggregated.llm", "xgrammar", "llguidance", "outlines_core", "rich", "pydantic",
    "opentelemetry", "requests", "httpx",
)  # fmt: skip
"""What only servers, other verbs or rare keys use; each would cost megabytes, and most of them tenths of a second."""


async def test_an_orchestrator_alone_is_small_and_loads_nothing_of_the_servers(tmp_path: Path) -> None:
    file = tmp_path / "disagg-config.yml"
    elsewhere = {
        f"{role}_servers": {"num_instances": 1, "urls": [f"127.0.0.1:{port}"]}
        for role, port in (("context", 1), ("generation", 2))
    }
    model = "smollm2-135m-instruct"
    file.write_text(yaml.safe_dump({"hostname": "127.0.0.1", "port": 0, "model": model, **elsewhere}))
    async with spawned("-X", "importtime", "-m", "orchestrator", "-c", str(file)) as orchestrator:
        async with asyncio.timeout(200):
            await orchestrator.wait_line("READY orchestrator")
            await orchestrator.wait_line("model_loaded")
        resident_bytes = psutil.Process(orchestrator.pid).memory_info().rss
        orchestrator.signal(signal.SIGINT)
        assert await orchestrator.wait_exit() == 0
    loaded = [match[1] for line in orchestrator.stderr if (match := IMPORTED.match(line))]
    assert "aiohttp.web" in loaded, "imports are not told as expected"
    assert not [name for name in loaded if name.startswith(NOT_NEEDED)]
    assert resident_bytes < RESIDENT_BYTES_MAX
