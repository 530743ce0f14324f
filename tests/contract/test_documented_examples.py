"""The programs in docs/transfer-library.md do what the page says, as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
PAGE: Final = ROOT / "docs" / "transfer-library.md"
LANDED: Final = "40 1234 196608 [5, 9, 2]"


def program(name: str, folder: Path) -> Path:
    """The block of code on the page that begins with this file's name."""
    (code,) = re.findall(rf"```python\n(# {re.escape(name)}\b.*?)```", PAGE.read_text(), flags=re.DOTALL)
    path = folder / name
    path.write_text(code)
    return path


@pytest.fixture
def environ() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def prefill(tmp_path: Path, environ: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen(
        [sys.executable, program("prefill.py", tmp_path)], stdout=subprocess.PIPE, text=True, env=environ
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def test_the_two_programs_bring_blocks_from_one_pool_into_the_other(
    prefill: subprocess.Popen[str], tmp_path: Path, environ: dict[str, str]
) -> None:
    assert prefill.stdout is not None
    address = prefill.stdout.readline().strip()
    decode = subprocess.run(
        [sys.executable, program("decode.py", tmp_path), address],
        capture_output=True,
        text=True,
        env=environ,
        timeout=200,
        check=False,
    )
    assert (decode.stdout.strip(), decode.stderr, decode.returncode) == (LANDED, "", 0)
    assert prefill.wait(timeout=30) == 0, "its blocks were released, so it ended by itself"


def test_what_the_page_says_is_printed_is_printed() -> None:
    assert f"# {LANDED}" in PAGE.read_text()


def test_the_library_loads_without_torch() -> None:
    loads = "import sys, kvtransfer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", loads], cwd=ROOT, timeout=200, check=False).returncode == 0
