"""The life of a server process, which both roles share: port, engine, ready line, heartbeats, drain, exit code.

A role brings its own service and where its KV pool lies; it never imports the other role.
"""
