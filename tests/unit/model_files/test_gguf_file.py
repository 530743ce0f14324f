"""The reader of GGUF files, against the `gguf` package's writer and reader."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from disaggregated.errors import ModelUnavailable
from disaggregated.model_files.gguf_file import GgufFile
from tests.unit.model_files.gguf_samples import tiny_llama, write_gguf


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", tiny_llama())


def test_every_key_type_comes_back_as_it_was_written(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "keys.gguf", "llama")
    written = {
        "uint8": 200, "int8": -100, "uint16": 60_000, "int16": -30_000, "uint32": 4_000_000, "int32": -2_000_000_000,
        "uint64": 1 << 63, "int64": -(1 << 62), "float32": 0.5, "float64": 0.1, "bool": True, "string": "Zürich 😀",
    }  # fmt: skip
    for kind, value in written.items():
        getattr(writer, f"add_{kind}")(f"test.{kind}", value)
    writer.add_array("test.words", ["a", "", "ß"])
    writer.add_array("test.numbers", [1, -2, 3])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GgufFile(tmp_path / "keys.gguf") as file:
        assert {kind: file.keys[f"test.{kind}"] for kind in written} == written
        assert file.keys["test.words"] == ["a", "", "ß"]
        assert file.keys["test.numbers"] == [1, -2, 3]
        assert file.architecture == "llama"


def test_tensors_are_where_the_gguf_package_finds_them(sample: Path) -> None:
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(sample).tensors}
    with GgufFile(sample) as file:
        assert set(file.tensors) == set(theirs)
        for name, tensor in file.tensors.items():
            assert tensor.shape == tuple(reversed(theirs[name].shape.tolist()))
            assert file.read(tensor, theirs[name].n_bytes) == theirs[name].data.tobytes()


def test_a_missing_key_is_named(sample: Path) -> None:
    with GgufFile(sample) as file, pytest.raises(ModelUnavailable, match=r"tiny\.gguf has no key llama\.nothing"):
        file.require("llama.nothing")


def test_a_header_cut_short_anywhere_is_one_clear_error(sample: Path) -> None:
    content = sample.read_bytes()
    with GgufFile(sample) as file:
        header_bytes = min(tensor.offset for tensor in file.tensors.values()) - 32
    for length in range(4, header_bytes, 61):
        sample.write_bytes(content[:length])
        with pytest.raises(ModelUnavailable, match=r"damaged or cut short"):
            GgufFile(sample)


def test_a_tensor_cut_short_is_named(sample: Path) -> None:
    sample.write_bytes(sample.read_bytes()[:-64])
    with GgufFile(sample) as file:
        last = max(file.tensors.values(), key=lambda tensor: tensor.offset)
        with pytest.raises(ModelUnavailable, match=rf"cut short in tensor {last.name}"):
            file.read(last, int(np.prod(last.shape)) * 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04 and so on", "is not a GGUF file"),
        (b"", "cannot read"),
        (b"GGUF\x01\x00\x00\x00" + bytes(64), "GGUF version 1"),
        (b"GGUF\x00\x00\x00\x03" + bytes(64), "little-endian"),
    ],
)
def test_what_is_not_a_readable_gguf_is_refused_in_words(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelUnavailable, match=message):
        GgufFile(path)


def test_a_file_that_is_not_there_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="No such file"):
        GgufFile(tmp_path / "nowhere.gguf")
