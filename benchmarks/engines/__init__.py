"""One engine beside another: prefill and decode of the same model, with the same threads, each in a process of its own.

`python -m benchmarks.engines` runs all of them; every other module here measures one system and prints one JSON line.
"""
