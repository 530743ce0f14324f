from __future__ import annotations

from typing import Any

import pytest

from disaggregated.v1 import control_pb2, kv_pb2
from orchestrator.agreement import disagreement
from orchestrator.server import Role, Server
from tests.support.byte_model import byte_model

LAYOUT = {
    "num_layers": 2, "num_kv_heads": 3, "head_dim": 64, "block_size": 16, "dtype": "float32", "num_blocks": 10,
    "num_planes": 2,
}  # fmt: skip


def description(**fields: Any) -> control_pb2.ServerDescription:
    layout = kv_pb2.KVLayout(**{**LAYOUT, **fields.pop("layout", {})})
    values = {"instance_id": "new", "role": "context", "model": "house/fake", "fingerprint": "f1", "layout": layout}
    return control_pb2.ServerDescription(**{**values, **fields})


@pytest.fixture
def other() -> Server:
    there = Server(Role.GENERATION, "host:2")
    there.description = description(instance_id="old", role="generation", layout={"num_blocks": 99})
    there.instance_id = "old"
    return there


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, None),
        ({"role": "generation"}, "host:1 is a generation server, and was named as a context server"),
        ({"model": "house/other"}, "serves 'house/other', and this deployment serves 'house/fake'"),
        ({"fingerprint": "f2"}, "fingerprint f2 here and f1 there (generation server old)"),
        ({"layout": {"num_layers": 3}}, "KV layouts differ: num_layers is 3 here and 2 there"),
        ({"layout": {"head_dim": 32}}, "KV layouts differ: head_dim is 32 here and 64 there"),
        ({"layout": {"block_size": 32}}, None),
        ({"layout": {"dtype": "bfloat16"}}, None),
        ({"instance_id": "old"}, "instance id 'old' is taken by the server at host:2"),
        ({"model": "/elsewhere/fake"}, None),
    ],
)
def test_a_server_that_serves_something_else_is_refused_in_words(
    other: Server, fields: dict[str, Any], reason: str | None
) -> None:
    found = disagreement(Server(Role.CONTEXT, "host:1"), description(**fields), [other], model=byte_model())
    assert found is None if reason is None else reason in str(found)


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        ({"block_size": 32}, "host:1: KV layouts differ: block_size is 32 here and 16 there (generation server old)"),
        ({"dtype": "bfloat16"}, "host:1: KV layouts differ: dtype is bfloat16 here and float32 there"),
        ({"num_blocks": 7}, None),
    ],
)
def test_servers_of_one_role_store_kv_alike(other: Server, layout: dict[str, Any], reason: str | None) -> None:
    newcomer = Server(Role.GENERATION, "host:1")
    found = disagreement(newcomer, description(role="generation", layout=layout), [other], model=byte_model())
    assert found is None if reason is None else str(found).startswith(reason)


def test_whoever_is_first_sets_the_terms() -> None:
    newcomer = Server(Role.CONTEXT, "host:1")
    assert disagreement(newcomer, description(model="x", fingerprint="y"), [newcomer], model=None) is None
