from kvtransfer.document import PAGE, printed
from kvtransfer.machine import CancelResult, DestinationPhase, SourcePhase


def test_the_printed_tables_are_fresh() -> None:
    assert PAGE.read_text() == printed(PAGE.read_text()), "run `make docs`"


def test_each_phase_and_each_result_has_its_row() -> None:
    page = PAGE.read_text()
    for name in [*SourcePhase, *DestinationPhase, *(result.name for result in CancelResult)]:
        assert f"| `{name}` |" in page
