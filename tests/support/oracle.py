"""The oracle: the same engine in one process. What it says is what every deployment must say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from disaggregated.config.server import KVCacheConfig, ServerConfig
from disaggregated.engine.api import EngineEvent, EngineRequest, RequestFailed, RequestKind, TokensSampled
from disaggregated.engine.load import load_engine
from disaggregated.sampling_params import SamplingParams
from kvtransfer import Region


class OneProcess:
    """Runs one sequence at a time, without the prefix cache: nothing that could be wrong in the same way twice."""

    def __init__(self, model: str, *, max_num_tokens: int = 256, num_threads: int = 2, max_tokens: int = 4096) -> None:
        self._region: Region | None = None
        config = ServerConfig(
            model=model,
            role="generation",
            dtype="float32",
            device="cpu",
            max_num_tokens=max_num_tokens,
            num_threads=num_threads,
            kv_cache_config=KVCacheConfig(enable_block_reuse=False, max_tokens=max_tokens),
        )
        self.loaded = load_engine(config, allocate=lambda layout: self._allocate(layout.pool_bytes))

    def _allocate(self, num_bytes: int) -> memoryview:
        self._region = Region.allocate(num_bytes)
        return self._region.buffer

    def generate(self, token_ids: Sequence[int], sampling: SamplingParams) -> list[int]:
        """The generated tokens, the stopping one included."""
        self.loaded.engine.submit(
            EngineRequest(request_id="oracle", kind=RequestKind.FULL, token_ids=token_ids, sampling=sampling)
        )
        return [token for event in self._events() for token in tokens_of(event)]

    def _events(self) -> Iterator[EngineEvent]:
        while self.loaded.engine.has_work:
            yield from self.loaded.engine.step()
        self.loaded.engine.check_integrity()


def tokens_of(event: EngineEvent) -> Sequence[int]:
    if isinstance(event, RequestFailed):
        raise event.error
    return event.token_ids if isinstance(event, TokensSampled) else ()
