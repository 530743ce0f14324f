"""A GGUF file as a directory in Hugging Face layout, so that everything behind knows one format only.

The text files (config, tokenizer, chat template) and the weights are made in two steps: the orchestrator needs only the
first, and a machine that runs nothing else never writes half a gigabyte. Quantised weights become float32 without loss;
float16 and bfloat16 stay what they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from disaggregated.errors import ModelUnavailable
from disaggregated.model_files import safetensors_file
from disaggregated.model_files.cache_folder import Progress, file_in_one_step, folder_in_one_step, locked
from disaggregated.model_files.converted import TEXT_FILES, WEIGHTS, is_converted
from disaggregated.model_files.gguf_config import ROPE_FACTORS, config_files, family_of, hugging_face_name
from disaggregated.model_files.gguf_file import GgufFile, GgufTensor
from disaggregated.model_files.gguf_tokenizer import tokenizer_files

if TYPE_CHECKING:
    import numpy as np

_PLAIN: Final = {0: "F32", 1: "F16", 30: "BF16"}
"""GGUF's plain float types, which are copied as they are."""


def convert(source: Path, target: Path, *, weights: bool, progress: Progress) -> None:
    """Make `target` a Hugging Face directory of the GGUF `source`; what is there already is not made again.

    Any number of processes may call this at once: one does the work, the others find it done. Each step has its own
    lock, so that who needs only the text files does not wait for the weights.
    """
    with GgufFile(source) as gguf:
        with locked(target.with_name(target.name + ".lock"), progress):
            if not is_converted(target, weights=False):
                _convert_text(gguf, target)
        if not weights:
            return
        with locked(target.with_name(target.name + ".weights.lock"), progress):
            if not is_converted(target, weights=True):
                progress(f"converting the weights of {source.name}")
                with file_in_one_step(target / WEIGHTS) as partial:
                    _convert_weights(gguf, partial)


def _convert_text(gguf: GgufFile, target: Path) -> None:
    config, generation_config = config_files(gguf)
    tokenizer, tokenizer_config = tokenizer_files(gguf)
    with folder_in_one_step(target) as folder:
        for name, content in zip(TEXT_FILES, (config, generation_config, tokenizer, tokenizer_config), strict=True):
            _write_json(folder / name, content)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    indent = None if path.name == "tokenizer.json" else 2
    path.write_text(json.dumps(content, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")


def _convert_weights(gguf: GgufFile, path: Path) -> None:
    tensors = [tensor for tensor in gguf.tensors.values() if tensor.name != ROPE_FACTORS]
    plans = [
        safetensors_file.TensorPlan(
            hugging_face_name(gguf, tensor.name), _PLAIN.get(tensor.ggml_type, "F32"), tensor.shape
        )
        for tensor in tensors
    ]
    safetensors_file.write(path, plans, _converted(gguf, tensors))


def _converted(gguf: GgufFile, tensors: list[GgufTensor]) -> Iterator[memoryview]:
    """One tensor's bytes after the other, so that no more than one is in memory."""
    import numpy as np

    heads = {
        "attn_q": gguf.require(f"{gguf.architecture}.attention.head_count"),
        "attn_k": gguf.keys.get(f"{gguf.architecture}.attention.head_count_kv"),
    }
    permuted = family_of(gguf).rope_is_permuted
    for tensor in tensors:
        array = _array(gguf, tensor)
        module = tensor.name.split(".")[-2]
        if permuted and module in heads:
            array = undo_rope_permutation(array, heads[module] or heads["attn_q"])
        yield np.ascontiguousarray(array).data.cast("B")


def _array(gguf: GgufFile, tensor: GgufTensor) -> np.ndarray[Any, Any]:
    """The tensor in its shape: float32, or two-byte integers that hold float16 or bfloat16."""
    import numpy as np

    plain = _PLAIN.get(tensor.ggml_type)
    count = int(np.prod(tensor.shape))
    if plain is not None:
        size = safetensors_file.ITEM_BYTES[plain]
        return np.frombuffer(gguf.read(tensor, count * size), np.float32 if size == 4 else np.uint16).reshape(
            tensor.shape
        )
    import gguf as gguf_package

    try:
        kind = gguf_package.GGMLQuantizationType(tensor.ggml_type)
        items, size = gguf_package.GGML_QUANT_SIZES[kind]
        rows = np.frombuffer(gguf.read(tensor, count // items * size), np.uint8)
        values = gguf_package.quants.dequantize(rows.reshape(*tensor.shape[:-1], -1), kind)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ModelUnavailable(
            f"{gguf.path}: tensor {tensor.name} has quantisation {tensor.ggml_type}, which cannot be read: {error}"
        ) from error
    return np.asarray(values, np.float32).reshape(tensor.shape)


def undo_rope_permutation(array: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """(N · D, …) with each head's rows as pairs (0, D/2), (1, D/2 + 1), … back to 0, 1, … D - 1."""
    half = array.shape[0] // num_heads // 2
    return array.reshape(num_heads, half, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
