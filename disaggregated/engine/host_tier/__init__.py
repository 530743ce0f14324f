"""A second place for KV blocks, in the host's ordinary memory: for what the pool has no room for at the moment.

slots.py     the books: which slot holds which block, which is the next to go
copies.py    what has to be copied, in which order, and who does it
memory.py    the slots' memory and the copies, for a pool on the CPU
device_memory.py    the same for a pool on a device: pinned memory, and the engine's own stream
"""
