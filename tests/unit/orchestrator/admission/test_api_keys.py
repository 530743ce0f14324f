from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from disaggregated.errors import ConfigError
from orchestrator.admission.api_keys import KeyRing, read_keys
from orchestrator.admission.key_file import LOOK_EVERY_S, KeyFile

KEY = "sk-0123456789abcdef"


def written(folder: Path, text: str, *, mode: int = 0o600) -> Path:
    path = folder / "keys.yml"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_an_entry_says_who_may_do_what(tmp_path: Path) -> None:
    text = f"""
    keys:
      - name: team-a
        key: {KEY}
        models: [small, large]
        requests_per_minute: 60
        tokens_per_minute: 1000
        weight: 2
        best_priority: -5
        operator: true
    """
    (key,) = read_keys(written(tmp_path, text))
    assert (key.name, key.models, key.weight, key.operator) == ("team-a", frozenset({"small", "large"}), 2.0, True)
    assert (key.requests_per_minute, key.tokens_per_minute, key.best_priority) == (60, 1000, -5)
    assert KEY not in repr(key)


def test_a_key_may_be_given_by_its_hash_alone_and_then_anybody_may_read_the_file(tmp_path: Path) -> None:
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    ring = KeyRing(read_keys(written(tmp_path, f'keys: [{{name: a, key_sha256: "{digest}"}}]', mode=0o644)))
    found = ring.find(KEY)
    assert found is not None
    assert found.name == "a"


def test_a_key_that_is_nearly_right_is_wrong(tmp_path: Path) -> None:
    ring = KeyRing(read_keys(written(tmp_path, f"keys: [{{name: a, key: {KEY}}}]")))
    assert ring.find(KEY) is not None
    for wrong in ("", KEY[:-1], KEY + "0", KEY.upper(), "x" * 100_000, "\udcff", KEY + "\0"):
        assert ring.find(wrong) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "`keys` must be a list with at least one entry"),
        ("keys: []", "`keys` must be a list"),
        ("kyes: []", "unknown key 'kyes'"),
        ("keys: [a]", r"keys\[0\]: must be a section"),
        (f"keys: [{{key: {KEY}}}]", r"keys\[0\].name: is missing"),
        ("keys: [{name: a}]", r"keys\[0\]: needs one of key and key_sha256"),
        ("keys: [{name: a, key: short}]", r"keys\[0\].key: has 5 characters, 16 to 512 are allowed"),
        ("keys: [{name: a, key: 1234567890123456789}]", r"keys\[0\].key: must be text"),
        ("keys: [{name: a, key_sha256: abc}]", r"keys\[0\].key_sha256: must be the 64 hexadecimal digits"),
        (f"keys: [{{name: a, key: {KEY}, wieght: 2}}]", r"keys\[0\]: unknown key 'wieght'; known are name, key"),
        (f"keys: [{{name: a, key: {KEY}, weight: 0}}]", r"keys\[0\].weight: must be between 0.001 and 1000.0"),
        (f"keys: [{{name: a, key: {KEY}, models: x}}]", r"keys\[0\].models: must be a list of model names"),
        (f"keys: [{{name: a, key: {KEY}, tokens_per_minute: 0}}]", r"tokens_per_minute: must be at least 1, is 0"),
        (f"keys: [{{name: a, key: {KEY}}}, {{name: b, key: {KEY}}}]", r"keys\[1\].key: an earlier entry has the same"),
        (f"keys: [{{name: a, key: {KEY}}}, {{name: a, key: {KEY}x}}]", r"keys\[1\].name: an earlier entry"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_that_never_shows_a_key(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        read_keys(written(tmp_path, text))
    assert KEY not in str(caught.value)
    assert "1234567890123456789" not in str(caught.value)


def test_a_file_that_others_may_read_is_refused_with_the_command_that_mends_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="chmod 600"):
        read_keys(written(tmp_path, f"keys: [{{name: a, key: {KEY}}}]", mode=0o644))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"api_keys_file: .*/none.yml: No such file"):
        read_keys(tmp_path / "none.yml")


class Watched:
    """A key file with a clock in our hands; what it begins in the background is run at once."""

    def __init__(self, path: Path) -> None:
        self.now_s = 0.0
        self.file = KeyFile(path, clock=lambda: self.now_s, start=self._start)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run(work)

    def name_of(self, key: str) -> str | None:
        self.now_s += LOOK_EVERY_S
        self.file.look()
        found = self.file.ring.find(key)
        return None if found is None else found.name


def replace(path: Path, text: str) -> None:
    """As an editor, or a mounted secret, does it: another file takes the name."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.chmod(0o600)
    os.replace(fresh, path)


def test_a_file_that_changes_is_read_anew_and_a_key_that_was_struck_out_is_no_longer_good(tmp_path: Path) -> None:
    path = written(tmp_path, f"keys: [{{name: a, key: {KEY}}}]")
    watched = Watched(path)
    assert watched.name_of(KEY) == "a"
    replace(path, f"keys: [{{name: b, key: {KEY}b}}]")
    assert watched.name_of(KEY) is None
    assert watched.name_of(f"{KEY}b") == "b"


@pytest.mark.parametrize("text", ["keys: [", "keys: []", None])
def test_a_file_that_becomes_wrong_changes_nothing_and_is_complained_of(tmp_path: Path, text: str | None) -> None:
    path = written(tmp_path, f"keys: [{{name: a, key: {KEY}}}]")
    watched = Watched(path)
    if text is None:
        path.unlink()
    else:
        replace(path, text)
    assert watched.name_of(KEY) == "a"
    assert "keys.yml" in watched.file.problem
    replace(path, f"keys: [{{name: c, key: {KEY}}}]")
    assert watched.name_of(KEY) == "c"
    assert watched.file.problem == ""


def test_the_file_is_looked_at_once_a_second_and_no_more(tmp_path: Path) -> None:
    path = written(tmp_path, f"keys: [{{name: a, key: {KEY}}}]")
    watched = Watched(path)
    replace(path, f"keys: [{{name: b, key: {KEY}}}]")
    watched.now_s += 0.99 * LOOK_EVERY_S
    watched.file.look()
    assert watched.file.ring.find(KEY) is not None
    found = watched.file.ring.find(KEY)
    assert found is not None
    assert found.name == "a"
