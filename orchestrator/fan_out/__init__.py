"""A decode step's tokens written to the connections of their streams in one native call."""

from orchestrator.fan_out.lanes import FanOut, Lane, Terminal

__all__ = ["FanOut", "Lane", "Terminal"]
