"""What `make` installs is named exactly in constraints.txt, and has what the tests of every transport need."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from kvtransfer.registry import TRANSPORTS

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
INSTALLED = [Requirement(line) for line in (*PROJECT["dependencies"], *EXTRAS["dev"])]
LINES = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]


def pins() -> dict[str, Version]:
    parted = [line.partition("==") for line in LINES]
    return {canonicalize_name(name): Version(version) for name, _, version in parted}


def test_every_line_is_one_exact_version() -> None:
    assert [line for line in LINES if "==" not in line or "*" in line] == []
    assert len(pins()) == len(LINES)


@pytest.mark.parametrize("wanted", INSTALLED, ids=str)
def test_what_make_installs_is_pinned_to_a_version_that_will_do(wanted: Requirement) -> None:
    assert wanted.specifier.contains(pins()[canonicalize_name(wanted.name)])


@pytest.mark.parametrize("extra", sorted({listed.extra for listed in TRANSPORTS.values() if listed.extra}))
def test_the_tests_environment_has_every_transports_packages(extra: str) -> None:
    installed = {canonicalize_name(wanted.name) for wanted in INSTALLED}
    assert {canonicalize_name(Requirement(line).name) for line in EXTRAS[extra]} <= installed
