"""Is a Hugging Face directory complete? Asked at start: a missing shard is one sentence then, and a traceback later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from disaggregated.errors import ModelUnavailable
from disaggregated.model_files import safetensors_file


def read_json(path: Path) -> dict[str, Any]:
    """Raises ModelUnavailable naming the file if it is missing or not a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelUnavailable(f"{path.parent} is not a model directory: it has no {path.name}") from error
    except OSError as error:
        raise ModelUnavailable(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ModelUnavailable(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ModelUnavailable(f"{path} is damaged: it is not a JSON object")
    return content


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, one or several shards. Raises ModelUnavailable if one is missing."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise ModelUnavailable(f"{index} is damaged: it has no weight_map")
        files = [folder / name for name in sorted(set(names.values()))]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        others = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".gguf")]
        hint = f" (there is {others[0]}, which is not read: convert it)" if others else ""
        raise ModelUnavailable(f"{folder} has no .safetensors file{hint}")
    for file in files:
        if not file.is_file():
            raise ModelUnavailable(f"{folder} is incomplete: {file.name} is missing; download it again")
    return files


def check_checkpoint(folder: Path, *, weights: bool) -> None:
    """Raises ModelUnavailable unless `folder` has a readable config and, if asked for, whole weights."""
    read_json(folder / "config.json")
    if weights:
        for file in weight_files(folder):
            safetensors_file.check(file)
