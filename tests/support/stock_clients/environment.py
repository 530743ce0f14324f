"""The environment of the stock clients: made once, outside the repository, and used until the versions here change."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, Final

VARIABLE: Final = "DISAGG_CLIENTS"
GUIDELLM_VARIABLE: Final = "DISAGG_GUIDELLM"
DEFAULT_FOLDER: Final = "~/.cache/disaggregated-clients"
PACKAGES: Final = (
    "openai==2.54.0",
    "langchain-openai==1.7.3",
    "litellm==1.106.2",
    "mcp==2.3.0",
    "instructor==1.17.0",
    "lm-eval[api]==0.4.13",
    "aiperf==0.13.0",
    "schemathesis==4.32.5",
)
"""Of lm-eval only what asks servers: no torch. litellm's responses import mcp, which it does not ask for."""
MAKE_TIMEOUT_S: Final = 1800.0
HERE: Final = pathlib.Path(__file__).parent


class ClientFailed(AssertionError):
    """Carries what the program wrote."""


class StockClients:
    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder

    @classmethod
    def ready(cls) -> StockClients:
        """Makes the environment if it is missing or older than the versions above: minutes, and 1.5 GB."""
        clients = cls(pathlib.Path(os.environ.get(VARIABLE, DEFAULT_FOLDER)).expanduser())
        stamp, wanted = clients.folder / "packages.txt", "\n".join(PACKAGES)
        if not (stamp.is_file() and stamp.read_text() == wanted):
            subprocess.run([sys.executable, "-m", "venv", clients.folder], check=True, timeout=MAKE_TIMEOUT_S)
            pip = [clients.program("python"), "-m", "pip", "install", "--quiet", *PACKAGES]
            subprocess.run(pip, check=True, timeout=MAKE_TIMEOUT_S)
            stamp.write_text(wanted)
        return clients

    @classmethod
    def with_guidellm(cls) -> StockClients | None:
        """An environment of its own, since it wants torch: nobody makes it here, `DISAGG_GUIDELLM` says where it is."""
        folder = os.environ.get(GUIDELLM_VARIABLE)
        return None if folder is None else cls(pathlib.Path(folder).expanduser())

    def program(self, name: str) -> str:
        return str(self.folder / "bin" / name)

    async def run(self, program: str, *arguments: str, timeout_s: float, **variables: str) -> str:
        """What it wrote to stdout. Raises ClientFailed with all it wrote if it does not end well, and in time."""
        process = await asyncio.create_subprocess_exec(
            self.program(program),
            *arguments,
            env={**_bare_environment(), **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(timeout_s):
                stdout, stderr = await process.communicate()
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        if process.returncode != 0:
            raise ClientFailed(f"{program} ended with {process.returncode}:\n{stdout.decode()}\n{stderr.decode()}")
        return stdout.decode()

    async def run_script(self, name: str, api: str, model: str) -> Mapping[str, Any]:
        """One of the scripts beside this file; what its last line says in JSON."""
        said = await self.run("python", str(HERE / f"{name}.py"), api, model, timeout_s=300)
        answer: Mapping[str, Any] = json.loads(said.strip().splitlines()[-1])
        return answer


def _bare_environment() -> dict[str, str]:
    """Offline, and with nothing of ours on the path."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    return kept | offline | {"OPENAI_API_KEY": "none", "OMP_NUM_THREADS": "1"}
