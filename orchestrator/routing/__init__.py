"""Where a request goes: what is known of each server, what each choice would cost, and the one that is taken. No I/O.

server.py ──▶ candidate.py ──▶ a policy for each hop ─┐
(its books)                                           ├─▶ placement.py ──▶ which servers, and why
speed.py, known_blocks.py ──▶ estimate.py ────────────┘
"""
