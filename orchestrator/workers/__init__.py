"""Several orchestrator processes on one port, and the process that started them.

                        ┌ worker 0: front door, dispatcher, links to every server ┐
    port (SO_REUSEPORT) ┼ worker 1: the same                                      ┼──▶ context and generation servers
                        └ worker 2: the same                                      ┘
                              ▲ which servers there are     │ each one's own numbers
                              └──────── supervisor ─────────┘ launcher; starts workers again

A worker knows what the others sent to a server from that server's own heartbeats, so that there is nothing to share but
the list of servers, the quotas of API keys, and answers that are about all: metrics, stories, scaling. Those go over
Unix sockets in a folder that only their user can enter.
"""
