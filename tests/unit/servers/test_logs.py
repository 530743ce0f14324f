"""One line an event, for people and for machines."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from disaggregated import logs


@pytest.fixture(autouse=True)
def _root_logger_is_put_back() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def written(environ: dict[str, str], event: str, level: str = "info", **fields: object) -> str:
    stream = io.StringIO()
    logs.configure("generation-0", stream=stream, environ=environ)
    getattr(logs.get("room"), level)(event, **fields)
    return stream.getvalue()


def test_a_line_is_time_level_process_event_and_fields() -> None:
    words = written({}, "transfer_done", request_id="r7", blocks=12, seconds=0.00412345).split()
    assert words[0].endswith("Z")
    assert words[1:] == ["INFO", "generation-0", "transfer_done", "request_id=r7", "blocks=12", "seconds=0.004123"]


def test_a_value_with_spaces_or_line_breaks_stays_one_word_in_quotes() -> None:
    line = written({}, "request_failed", error='lost "ctx"\nagain')
    assert line.endswith('error="lost \\"ctx\\"\\nagain"\n')


def test_json_lines_hold_the_same_fields_with_their_types() -> None:
    line = json.loads(written({"DISAGG_LOG_FORMAT": "json"}, "transfer_done", blocks=12, peer={"id": "c-0"}))
    assert (line["event"], line["blocks"], line["peer"], line["process"]) == (
        "transfer_done",
        12,
        {"id": "c-0"},
        "generation-0",
    )


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_an_exception_is_logged_with_its_traceback(log_format: str) -> None:
    stream = io.StringIO()
    logs.configure("context-0", stream=stream, environ={"DISAGG_LOG_FORMAT": log_format})
    try:
        raise KeyError("block 7")
    except KeyError as error:
        logs.get("room").traceback("engine_crashed", error, step=3)
    assert "test_an_exception_is_logged" in stream.getvalue()
    assert "block 7" in stream.getvalue()


def test_lines_below_the_level_are_not_written() -> None:
    stream = io.StringIO()
    logs.configure("context-0", level="warning", stream=stream, environ={})
    logs.get("room").info("step_done")
    logs.get("room").warning("lease_expired")
    assert "step_done" not in stream.getvalue()
    assert "lease_expired" in stream.getvalue()


def test_lines_of_libraries_come_out_in_the_same_form() -> None:
    stream = io.StringIO()
    logs.configure("context-0", stream=stream, environ={})
    logging.getLogger("library").warning("took %d s", 3)
    assert stream.getvalue().endswith("WARNING context-0 took 3 s\n")
