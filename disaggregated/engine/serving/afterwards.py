"""What a server does once it is ready, beside its first requests: none of them has to wait for it.

The KV pool's pages are taken from the system, a third of a second for a gigabyte, and then the library that follows
grammars is loaded, which takes as long. A request that comes before this is done touches its pages by itself, some
thousands, and a grammar waits for its library.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from disaggregated.engine.serving.role import PoolMemory
from disaggregated.errors import NotEnoughMemory

if TYPE_CHECKING:
    from disaggregated.engine.load import LoadedEngine


def begin(memory: PoolMemory, loaded: LoadedEngine, on_crash: Callable[[BaseException], None]) -> threading.Thread:
    """on_crash: called when the pages are not there. The thread ends by itself, and with the process."""

    def work() -> None:
        try:
            memory.populate()
        except NotEnoughMemory as error:
            on_crash(error)
            return
        if loaded.grammars is not None:
            loaded.grammars.load()

    thread = threading.Thread(target=work, name="afterwards", daemon=True)
    thread.start()
    return thread
