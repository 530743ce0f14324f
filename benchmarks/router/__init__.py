"""What the front door costs: our orchestrator beside other routers, in front of servers that only pretend."""
