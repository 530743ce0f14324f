"""What every process of a disaggregated deployment shares: configuration, errors, wire types, KV layout.

`from disaggregated import LLM, SamplingParams` is the engine for a program of one process. It is loaded when asked
for, by name: whoever imports this package for anything else, as the orchestrator does, gets nothing of it.
"""

import importlib
import os

# Else gRPC tells its own affairs ("skipping fork() handlers") on stderr, into our log. It looks when it is loaded.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

__version__ = "0.1.0"

_OF_ONE_PROCESS = ("LLM", "CompletionOutput", "RequestOutput", "SamplingParams")


def __getattr__(name: str) -> object:
    if name in _OF_ONE_PROCESS:
        return getattr(importlib.import_module("disaggregated.llm"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_OF_ONE_PROCESS])
