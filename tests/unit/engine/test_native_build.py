"""The kernels are compiled once, by whoever is first, and their absence is told in words."""

from __future__ import annotations

import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import disaggregated.native_build
from disaggregated.engine.ops import native, native_build
from disaggregated.native_build import NativeUnavailable

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler here")


@pytest.fixture(autouse=True)
def chosen_by_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("DISAGG_NATIVE_ISA", raising=False)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one."""
    monkeypatch.setenv("DISAGG_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a library that compiles in no time: the kernels take a quarter of a minute."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "threads.h").write_text("int answer(void);\n")
    (folder / "threads.c").write_text('#include "threads.h"\nint answer(void) { return 42; }\n')
    monkeypatch.setattr(native_build, "SOURCES", folder)
    return folder


@needs_compiler
def test_servers_that_start_together_compile_once_and_later_ones_not_at_all(
    cache: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_, compiled = disaggregated.native_build._compile, []

    def counted(compiler: tuple[str, ...], flags: tuple[str, ...], sources: Path, path: Path) -> None:
        compiled.append(path)
        compile_(compiler, flags, sources, path)

    monkeypatch.setattr(disaggregated.native_build, "_compile", counted)
    with ThreadPoolExecutor(3) as pool:
        paths = list(pool.map(native_build.library, ["baseline"] * 3))
    assert compiled == [paths[0]]
    assert set(paths) == set(compiled)
    assert native_build.library("baseline") == paths[0]
    assert len(compiled) == 1
    leftovers = {path.name for path in paths[0].parent.iterdir()}
    assert leftovers == {"kernels-baseline.so", ".lock"}
    assert paths[0].is_relative_to(cache / "native")


@needs_compiler
def test_other_sources_get_another_library(cache: Path, sources: Path) -> None:
    before = native_build.library("baseline")
    with (sources / "threads.h").open("a") as file:
        file.write("/* changed */\n")
    assert native_build.library("baseline").parent != before.parent


@needs_compiler
def test_sources_that_do_not_compile_are_told_with_the_compiler_s_own_words(cache: Path, sources: Path) -> None:
    (sources / "broken.c").write_text("this is not C;\n")
    with pytest.raises(NativeUnavailable, match=r"broken\.c"):
        native_build.library("baseline")


def test_without_a_compiler_there_are_no_native_ops_and_the_log_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert native.load(1) is None
    assert "apt-get install gcc" in caplog.text


@pytest.mark.parametrize(("command", "words"), [("no-such-compiler -m64", "is not there"), ("false", "failed")])
def test_a_compiler_that_cannot_be_run_is_named(
    command: str, words: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", command)
    with pytest.raises(NativeUnavailable, match=rf"{command}.*{words}"):
        native_build.library("baseline")


@needs_compiler
def test_an_unwritable_cache_is_told_with_the_variable_that_moves_it(cache: Path) -> None:
    (cache / "native").write_text("a file where a folder should be")
    with pytest.raises(NativeUnavailable, match="set DISAGG_CACHE_DIR"):
        native_build.library("baseline")


def test_an_instruction_set_that_the_cpu_lacks_is_refused_in_words(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DISAGG_NATIVE_ISA", "sve2")
    with caplog.at_level(logging.WARNING):
        assert native.load(1) is None
    assert "cannot run sve2" in caplog.text


@needs_compiler
def test_the_environment_chooses_a_narrower_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISAGG_NATIVE_ISA", "baseline")
    ops = native.load(2)
    assert ops is not None
    assert ops.name == "native-baseline"


@needs_compiler
def test_the_command_prints_the_library_it_built(
    cache: Path, sources: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["native_build", "baseline"])
    assert native_build.main() == 0
    assert Path(capsys.readouterr().out.strip()).name == "kernels-baseline.so"


def test_the_command_tells_which_instruction_sets_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["native_build", "mmx"])
    assert native_build.main() == 2
    assert "avx2" in capsys.readouterr().err
