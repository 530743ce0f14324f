"""From a name to a directory: what counts as a model, and what is said about what does not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from disaggregated.errors import ModelUnavailable
from disaggregated.model_files import resolve
from disaggregated.model_files.cache_folder import cache_folder
from disaggregated.model_files.checkpoint import weight_files
from disaggregated.model_files.gguf_convert import convert
from tests.unit.model_files.gguf_samples import tiny_llama, write_gguf


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A whole Hugging Face directory."""
    target = tmp_path / "models" / "Tiny-Llama"
    convert(write_gguf(tmp_path / "tiny.gguf", tiny_llama()), target, weights=True, progress=lambda line: None)
    return target


def split_in_two(folder: Path) -> None:
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = {name: f"model-{1 + names.index(name) % 2:05}-of-00002.safetensors" for name in names}
    for file in set(files.values()):
        part = {name: np.ascontiguousarray(tensors[name]) for name in names if files[name] == file}
        safetensors.numpy.save_file(part, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "model.safetensors").unlink()


def test_a_directory_is_taken_as_it_is(checkpoint: Path) -> None:
    files = resolve(str(checkpoint) + "/")
    assert (files.name, files.aliases, files.path) == (str(checkpoint), ("Tiny-Llama",), checkpoint)


def test_a_relative_directory_is_known_by_its_own_name_too(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint)
    assert resolve(".").aliases == ("Tiny-Llama",)


def test_shards_are_found_by_their_index(checkpoint: Path) -> None:
    split_in_two(checkpoint)
    resolve(str(checkpoint))
    assert [file.name for file in weight_files(checkpoint)] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_a_missing_shard_is_named(checkpoint: Path) -> None:
    split_in_two(checkpoint)
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelUnavailable, match=r"incomplete: model-00002-of-00002\.safetensors is missing"):
        resolve(str(checkpoint))
    assert resolve(str(checkpoint), weights=False).path == checkpoint


@pytest.mark.parametrize("index", ["{", "{}", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_a_damaged_index_is_named(checkpoint: Path, index: str) -> None:
    (checkpoint / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelUnavailable, match=r"model\.safetensors\.index\.json is damaged"):
        resolve(str(checkpoint))


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]", b"\x02\0\0\0\0\0\0\0{}more"])
def test_weights_that_are_no_safetensors_are_named(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelUnavailable, match=r"model\.safetensors is (damaged|not)"):
        resolve(str(checkpoint))


def test_weights_cut_short_are_found_at_start(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ModelUnavailable, match=r"damaged \(\d+ bytes instead of \d+\)"):
        resolve(str(checkpoint))


def test_weights_in_an_older_format_are_pointed_at(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(ModelUnavailable, match=r"no \.safetensors file \(there is pytorch_model\.bin"):
        resolve(str(checkpoint))


def test_a_directory_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"is not a model directory: it has no config\.json"):
        resolve(str(tmp_path))


def test_a_gguf_file_is_converted_once_and_found_again(tmp_path: Path) -> None:
    source, lines = write_gguf(tmp_path / "My Model.gguf", tiny_llama()), list[str]()
    first = resolve(str(source), cache_dir=tmp_path / "cache", progress=lines.append)
    assert (first.name, first.aliases) == ("My Model", (str(source),))
    assert lines == ["converting the weights of My Model.gguf"]
    assert resolve(str(source), cache_dir=tmp_path / "cache", progress=lines.append) == first
    assert len(lines) == 1


def test_a_changed_gguf_file_is_converted_anew(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    before = resolve(str(source), cache_dir=tmp_path / "cache").path
    write_gguf(source, tiny_llama(np.random.default_rng(1)))
    after = resolve(str(source), cache_dir=tmp_path / "cache").path
    assert before != after
    assert (before / "model.safetensors").read_bytes() != (after / "model.safetensors").read_bytes()


def test_a_filled_cache_is_only_read(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    cache = tmp_path / "cache"
    resolve(str(source), cache_dir=cache)
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    resolve(str(source), cache_dir=cache)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


def test_a_cache_that_cannot_be_written_to_is_named_with_the_way_out(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(ModelUnavailable, match=r"cannot write to the model cache .*set DISAGG_CACHE_DIR"):
        resolve(str(source), cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    "name", ["smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", "SMOLLM2-135M-instruct"]
)
def test_the_bundled_model_is_known_by_its_names_in_any_case(name: str) -> None:
    files = resolve(name)
    assert files.name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "smollm2-135m-instruct" in files.aliases


def test_a_directory_goes_before_the_bundled_model(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.move(checkpoint, checkpoint.parent / "smollm2-135m-instruct")
    monkeypatch.chdir(checkpoint.parent)
    assert resolve("smollm2-135m-instruct").path == Path("smollm2-135m-instruct")


def hub_snapshot(home: Path, checkpoint: Path, revision: str) -> Path:
    snapshot = home / "hub" / "models--Somebody--Tiny-Llama" / "snapshots" / revision
    shutil.copytree(checkpoint, snapshot)
    return snapshot


def test_a_repository_in_the_hugging_face_cache_is_found(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    main, _other = (hub_snapshot(tmp_path / "hf", checkpoint, revision) for revision in ("abc", "def"))
    reference = main.parents[1] / "refs" / "main"
    reference.parent.mkdir()
    reference.write_text("abc\n")
    files = resolve("Somebody/Tiny-Llama")
    assert (files.name, files.aliases, files.path) == ("Somebody/Tiny-Llama", ("Tiny-Llama",), main)


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (
            "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
            "not in the Hugging Face cache, and nothing but smollm2-135m-instruct is",
        ),
        ("gpt-4", "there is no model 'gpt-4'"),
        ("", "there is no model ''"),
        ("/nowhere/at/all", "/nowhere/at/all does not exist"),
        ("missing.gguf", r"missing\.gguf does not exist"),
        (__file__, r"is a file but not a \.gguf"),
    ],
)
def test_what_is_no_model_is_told_apart(
    model: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    with pytest.raises(ModelUnavailable, match=complaint):
        resolve(model)


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISAGG_CACHE_DIR", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_folder() == Path("/a")
    monkeypatch.delenv("DISAGG_CACHE_DIR")
    assert cache_folder() == Path("/b/disaggregated")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("~/.cache/disaggregated").expanduser()


def test_a_warm_start_imports_neither_numpy_nor_torch() -> None:
    resolve("smollm2-135m-instruct", weights=False)
    code = (
        "import sys; from disaggregated.model_files import resolve; resolve('smollm2-135m-instruct', weights=False); "
        "from disaggregated.text import Tokenizer; "
        "print(sorted({'numpy', 'gguf', 'torch', 'safetensors', 'subprocess'} & set(sys.modules)))"
    )
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=True)
    assert outcome.stdout.strip() == "[]"
