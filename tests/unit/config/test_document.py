from __future__ import annotations

from pathlib import Path

from disaggregated.config.document import document


def test_the_printed_documentation_is_fresh() -> None:
    committed = Path(__file__).parents[3] / "docs" / "config.md"
    assert committed.read_text() == document(), "run `make docs`"
