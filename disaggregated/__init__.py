"""What every process of a disaggregated deployment shares: configuration, errors, wire types, KV layout.

`from disaggregated import LLM, SamplingParams` is the engine for a program of one process. It is loaded when asked
for, by name: whoever imports this package for anything else, as the orchestrator does, gets nothing of it.
"""

import importlib
import os

# gRPC looks at these when it is loaded. Else it tells its own affairs on stderr, into our log; and starts its threads
# again in a child that was forked, which share our epoll sets and can crash before the child has become the program
# that it was to be: uvloop forks for each process that it starts.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

__version__ = "0.1.0"

_OF_ONE_PROCESS = ("LLM", "CompletionOutput", "GuidedDecodingParams", "Logprob", "RequestOutput", "SamplingParams")


def __getattr__(name: str) -> object:
    if name in _OF_ONE_PROCESS:
        return getattr(importlib.import_module("disaggregated.llm"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_OF_ONE_PROCESS])
