"""One line an event: a past-tense name and fields.

    2026-03-01T12:00:00.123Z INFO generation-0 transfer_done request_id=r7 blocks=12 seconds=0.0041

or, with `DISAGG_LOG_FORMAT=json`, the same as one object. Everything goes to stderr: stdout belongs to the ready line.
It all stands on the standard library's `logging`, so the lines of libraries come out in the same form and a test reads
ours with pytest's `caplog`.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import sys
from collections.abc import Mapping
from typing import Any, Final, TextIO

_FIELDS: Final = "event_fields"


class EventLog:
    """What a module logs through. Formatting is done only for lines that are written."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    @property
    def writes_info(self) -> bool:
        """For who has to work out what to say."""
        return self._logger.isEnabledFor(logging.INFO)

    def debug(self, event: str, **fields: object) -> None:
        self._write(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: object) -> None:
        self._write(logging.INFO, event, fields)

    def warning(self, event: str, **fields: object) -> None:
        self._write(logging.WARNING, event, fields)

    def error(self, event: str, **fields: object) -> None:
        self._write(logging.ERROR, event, fields)

    def traceback(self, event: str, raised: BaseException, **fields: object) -> None:
        """An error with the traceback of `raised`."""
        self._write(logging.ERROR, event, {**fields, "error": repr(raised)}, raised)

    def _write(self, level: int, event: str, fields: Mapping[str, object], raised: BaseException | None = None) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, event, extra={_FIELDS: fields}, exc_info=raised)


def get(name: str) -> EventLog:
    return EventLog(logging.getLogger(name))


def configure(
    process_name: str, *, level: str = "info", stream: TextIO | None = None, environ: Mapping[str, str] = os.environ
) -> None:
    """Send every log line of this process to `stream` (stderr), marked with `process_name`. Called once, at start.

    level: "debug", "info", "warning" or "error".
    """
    formatter = _JsonLines(process_name) if environ.get("DISAGG_LOG_FORMAT") == "json" else _TextLines(process_name)
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)


class _TextLines(logging.Formatter):
    def __init__(self, process_name: str) -> None:
        super().__init__()
        self._process_name = process_name

    def format(self, record: logging.LogRecord) -> str:
        words = [_time_of(record), record.levelname, self._process_name, record.getMessage()]
        words += [f"{key}={_plain(value)}" for key, value in _fields_of(record).items()]
        return _with_traceback(" ".join(words), self, record)


class _JsonLines(logging.Formatter):
    def __init__(self, process_name: str) -> None:
        super().__init__()
        self._process_name = process_name

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _time_of(record),
            "level": record.levelname,
            "process": self._process_name,
            "logger": record.name,
            "event": record.getMessage(),
            **_fields_of(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _fields_of(record: logging.LogRecord) -> Mapping[str, object]:
    return getattr(record, _FIELDS, {})


def _time_of(record: logging.LogRecord) -> str:
    moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _plain(value: object) -> str:
    """A field's value as one word, so that a line splits at its spaces; in quotes where it has any of its own."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return json.dumps(text) if not text or set(text) & set(' "=\n\r\t') else text


def _with_traceback(line: str, formatter: logging.Formatter, record: logging.LogRecord) -> str:
    return f"{line}\n{formatter.formatException(record.exc_info)}" if record.exc_info else line
