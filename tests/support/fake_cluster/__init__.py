"""Servers in virtual time that crash, freeze, refuse and damage at moments drawn from a seed.

`FakeServer` is the process, `FakeClient` one connection to it, with the Protocol of `orchestrator.server_client`. What
a frozen server is told waits until it thaws; what a crashed one was doing is gone, and every call to it fails.
"""

from __future__ import annotations

from tests.support.fake_cluster.client import FakeClient
from tests.support.fake_cluster.cluster import FakeCluster
from tests.support.fake_cluster.pipe import Pipe
from tests.support.fake_cluster.server import LEASE_S, FakeServer
from tests.support.fake_cluster.temper import Temper

__all__ = ["LEASE_S", "FakeClient", "FakeCluster", "FakeServer", "Pipe", "Temper"]
