"""Brings KV from pools of one shape into a pool of another: other ranks, other block size, other dtype.

    planner   which source rank's layers and heads go where in our pool, and what cannot be converted, in words
    tokens    which places of our blocks the tokens of a source's block go to
    values    numbers of one dtype as numbers of another, with their scales
    executor  copies verified blocks from a staging region, in the source's shape, into our pool

Pure but for the copies of `executor`: nothing here reads from a peer.
"""
