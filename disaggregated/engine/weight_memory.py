"""How much memory a model's weights will take, reckoned before they are read: a model that does not fit is refused
then, not killed later."""

from __future__ import annotations

from typing import Final

from disaggregated.engine.precision import WEIGHT_BYTES, Precision
from disaggregated.engine.weights import num_parameters, safetensors_paths
from disaggregated.model_files import ModelConfig, ModelFiles

HALF_BYTES: Final = 2
_HEADERS: Final = 1.05
"""Of a checkpoint's files, what is not numbers."""


def weight_bytes(config: ModelConfig, precision: Precision, *, is_half: bool = False) -> int:
    """Of a loaded model, at most. The embedding is never quantised or narrowed; an output head tied to it is then a
    matrix of its own.

    `is_half`: a table that computes in float32 holds the linears as they are stored, in bfloat16 or float16. (What a
    GGUF has in 4 bits takes even less, but that shows only once it is read.)
    """
    table = config.vocab_size * config.hidden_size
    num_in_linears = num_parameters(config) - (0 if config.tie_word_embeddings else table)
    if precision.quantization != "none":
        return num_in_linears * WEIGHT_BYTES[precision.quantization] + table * precision.dtype.itemsize
    if is_half and precision.dtype.itemsize > HALF_BYTES:
        return num_in_linears * HALF_BYTES + table * precision.dtype.itemsize
    return num_parameters(config) * precision.dtype.itemsize


def is_stored_in_half(files: ModelFiles, config: ModelConfig) -> bool:
    """Whether the numbers of a checkpoint take two bytes each, by the size of its files."""
    stored = sum(path.stat().st_size for path in safetensors_paths(files.path))
    return stored <= HALF_BYTES * num_parameters(config) * _HEADERS + (1 << 20)
