"""Small GGUF files, written with the `gguf` package's own writer, so that ours is not tested against itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Array = np.ndarray[Any, Any]

CONTROL = 3
BYTE = 6


def byte_alphabet() -> list[str]:
    """GPT-2's spelling of the 256 bytes, in the order of the bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def add_byte_level_vocabulary(writer: gguf.GGUFWriter, *, cut: str = "smollm", vocab_size: int = 264) -> None:
    """Two control tokens, the bytes, a few merges, and padding up to `vocab_size`."""
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w"]
    tokens = ["<s>", "</s>", *byte_alphabet(), *(merge.replace(" ", "") for merge in merges)]
    tokens += [f"<unused{index}>" for index in range(vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if token.startswith("<") and len(token) > 1 else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def add_sentencepiece_vocabulary(writer: gguf.GGUFWriter, pieces: Mapping[str, float]) -> None:
    """Control tokens, the 256 bytes, then `pieces` with their scores."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + list(pieces.values()))
    writer.add_token_types([2, CONTROL, CONTROL] + [BYTE] * 256 + [1] * len(pieces))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def tiny_llama(rng: np.random.Generator | None = None) -> dict[str, Array]:
    """One layer of random weights under GGUF's names: hidden 64, 4 heads of 16, 2 kv heads, ffn 96, vocabulary 264."""
    rng = rng or np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (264, 64),
        "output_norm.weight": (64,),
        "blk.0.attn_norm.weight": (64,),
        "blk.0.attn_q.weight": (64, 64),
        "blk.0.attn_k.weight": (32, 64),
        "blk.0.attn_v.weight": (32, 64),
        "blk.0.attn_output.weight": (64, 64),
        "blk.0.ffn_norm.weight": (64,),
        "blk.0.ffn_gate.weight": (96, 64),
        "blk.0.ffn_up.weight": (96, 64),
        "blk.0.ffn_down.weight": (64, 96),
    }
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def write_gguf(
    path: Path,
    tensors: Mapping[str, Array],
    *,
    architecture: str = "llama",
    num_layers: int = 1,
    quantization: gguf.GGMLQuantizationType | None = None,
    vocabulary: Mapping[str, float] | None = None,
    cut: str = "smollm",
    keys: Mapping[str, Any] | None = None,
) -> Path:
    """A file with the shape of `tiny_llama`; `quantization` is for matrices, `keys` are added at the end."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(num_layers)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    if vocabulary is None:
        add_byte_level_vocabulary(writer, cut=cut)
    else:
        add_sentencepiece_vocabulary(writer, vocabulary)
    _add_keys(writer, keys or {})
    for name, tensor in tensors.items():
        if quantization is None or tensor.ndim == 1:
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(name, gguf.quants.quantize(tensor, quantization), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_keys(writer: gguf.GGUFWriter, keys: Mapping[str, Any]) -> None:
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            writer.add_array(key, value)
        else:
            writer.add_string(key, value)
