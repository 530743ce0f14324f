"""Talks to a running orchestrator over HTTP, for the verbs that change or show a deployment."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any, Final

import click

API_KEY_VARIABLE: Final = "DISAGG_API_KEY"
"""Of an operator, where the deployment has API keys."""
_STATUS_TIMEOUT_S = 5.0
_WORD_MAX = 40
"""Characters. Whatever is longer is a sentence, to the width of which the other rows are not stretched."""


def scale(url: str, wanted: Mapping[str, int], *, timeout_s: float) -> None:
    """Returns when it is done. Raises ClickException with the orchestrator's own words when it is refused."""
    code, answer = _call(f"{url}/cluster/scale", wanted, timeout_s=timeout_s)
    if code != 200:
        raise click.ClickException(_reason(code, answer))


def status(url: str) -> tuple[list[str], bool]:
    """Lines for a reader, and whether requests can be served."""
    code, health = _call(f"{url}/health", timeout_s=_STATUS_TIMEOUT_S)
    info_code, info = _call(f"{url}/cluster_info", timeout_s=_STATUS_TIMEOUT_S)
    if info_code != 200:
        raise click.ClickException(_reason(info_code, info))
    lines = [f"{url}: {'serving' if code == 200 else f'not serving: {_reason(code, health)}'}"]
    rows = [_worker_row(worker) for workers in info["current_workers"].values() for worker in workers]
    rows += [_process_row(local) for local in info.get("processes", []) if local["phase"] != "ready"]
    columns = zip(*rows, strict=True)
    widths = [max((len(word) for word in column if len(word) <= _WORD_MAX), default=0) for column in columns]
    for row in rows:
        lines.append("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip())
    for workers in info["current_workers"].values():
        lines += [link_line(worker, link) for worker in workers for link in worker.get("links", ()) if link.get("peer")]
    return lines, code == 200


def story(url: str, request_id: str) -> list[Mapping[str, Any]]:
    """Of each sequence of a request. Raises ClickException when it is not known."""
    code, answer = _call(f"{url}/requests/{urllib.parse.quote(request_id, safe='')}", timeout_s=_STATUS_TIMEOUT_S)
    if code != 200:
        raise click.ClickException(_reason(code, answer))
    return list(answer.get("sequences", [answer]))


def _worker_row(worker: Mapping[str, Any]) -> list[str]:
    room = f"{worker['blocks_free']} of {worker['blocks']} blocks free" if worker.get("blocks") else ""
    reason = worker.get("reason") or f"{worker.get('requests', 0)} requests"
    address = f"{worker['host']}:{worker['port']}"
    return [worker["role"], address, worker.get("standing", ""), reason, room]


def link_line(worker: Mapping[str, Any], link: Mapping[str, Any]) -> str:
    """Who reads KV from whom, over what, how fast, and why so."""
    speed = f", {link['bytes_per_s'] / 1e9:.1f} GB/s" if link["bytes_per_s"] else ""
    failed = f", {link['failures']} failed" if link["failures"] else ""
    done = f"{link['transfers']} transfers, {link['bytes'] / 2**20:.1f} MiB{speed}{failed}"
    ends = f"{link['peer']} -> {worker['worker_id']}"
    return f"KV {ends}  {link['transport']} ({link['devices']}): {done}; {link['why']}"


def _process_row(local: Mapping[str, Any]) -> list[str]:
    last = f"last one ended with {local['last_exit']}" if local["last_exit"] else ""
    return [local["role"], local["name"], local["phase"], f"for {local['phase_s']:.0f} s", last]


def _call(url: str, body: Mapping[str, Any] | None = None, *, timeout_s: float) -> tuple[int, Any]:
    if "://" not in url:
        url = f"http://{url}"
    payload = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    if key := os.environ.get(API_KEY_VARIABLE):
        headers["authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, data=payload, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return answer.status, _parsed(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, _parsed(error.read())
    except TimeoutError as error:
        raise click.ClickException(f"{url}: no answer within {timeout_s:g} s") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise click.ClickException(f"no orchestrator answers at {url}: {reason}") from error


def _parsed(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return {}


def _reason(code: int, answer: Any) -> str:
    error = answer.get("error") if isinstance(answer, dict) else None
    return str(error["message"]) if isinstance(error, dict) and "message" in error else f"it answered {code}"
