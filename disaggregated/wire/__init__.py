"""The orchestrator's own connection to a server: the same calls as gRPC's, at a tenth of the cost of a message.

    orchestrator ── one TCP connection a server, every call on it ──▶ server

gRPC stays where cost does not matter, and tells the port of this (`ServerDescription.wire_port`). What is said is the
same: the messages of `control.proto`, served by the same objects. See docs/decisions/0018-calls-in-frames.md.
"""

from disaggregated.wire.client import Receiver, WireConnection
from disaggregated.wire.server import WireServer

__all__ = ["Receiver", "WireConnection", "WireServer"]
