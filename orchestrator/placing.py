"""One run and the router: what the router is asked about it, which servers it gets, and why it got none in time."""

from __future__ import annotations

from collections.abc import Sequence

from disaggregated.block_hash import BlockHash, block_hashes
from disaggregated.config.deployment import DeploymentConfig
from disaggregated.errors import DeadlineExceeded, DisaggregatedError, NoServerAvailable
from disaggregated.request_life import Phase
from disaggregated.v1 import control_pb2
from orchestrator.request_run import RequestRun, TokenRequest
from orchestrator.retries import TRANSFER_FAILURES_MAX
from orchestrator.routing.make import make_placer
from orchestrator.routing.placement import Needs, NotYet, Placement
from orchestrator.routing.prefix_hints import prefix_hint
from orchestrator.server import Role
from orchestrator.server_pools import ServerPools


class RunPlacer:
    """Places runs on the servers of `pools` by the routers of the configuration. Computes, and waits for nothing."""

    def __init__(self, config: DeploymentConfig, pools: ServerPools) -> None:
        self._pools = pools
        self._placer = make_placer(config)
        pools.follows_blocks = pools.follows_blocks or self._placer.wants_blocks

    def wants_hashes(self, request: TokenRequest) -> bool:
        """Of a prompt whose logprobs are told, all is computed."""
        is_known = self._placer.wants_blocks or self._pools.knows_blocks
        return is_known and bool(self._pools.block_size) and request.sampling.prompt_logprobs is None

    def hashes(self, request: TokenRequest) -> Sequence[BlockHash]:
        """Of the prompt's full blocks. Touches nothing else, so it may run on a thread."""
        return list(block_hashes(request.token_ids, self._pools.block_size, salt=request.cache_salt))

    def place(self, run: RequestRun, *, now_s: float) -> Placement | None:
        """None: nobody has room, and the run keeps why."""
        pools = self._pools
        found = self._placer.place(_needs(run, now_s), pools.of(Role.CONTEXT), pools.of(Role.GENERATION))
        if isinstance(found, NotYet):
            run.not_yet = found
            return None
        return found

    def hint(self, run: RequestRun, placement: Placement) -> control_pb2.PrefixHint | None:
        """Which generation server the context server may bring the prompt's beginning from."""
        if run.block_hashes and placement.context is not None and placement.context.pulls_back:
            return prefix_hint(run.block_hashes, placement.context, self._pools.ready(Role.GENERATION))
        return None

    def too_late(self, run: RequestRun, *, now_s: float) -> DisaggregatedError:
        """What a client is told whose deadline passed: what its request waited for, or how far it came."""
        waited_s = now_s - run.request.arrived_s
        if run.life.phase is not Phase.QUEUED:
            return DeadlineExceeded(f"not finished after {waited_s:.1f} s, {len(run.emitted)} tokens were generated")
        not_yet = run.not_yet or NotYet("others stand before it")
        if not self._pools.ready(Role.GENERATION):
            return NoServerAvailable(f"no generation server is ready; waited {waited_s:.1f} s")
        if not_yet.is_for_want_of_servers:
            return NoServerAvailable(f"{not_yet.reason}; waited {waited_s:.1f} s")
        return DeadlineExceeded(f"waited {waited_s:.1f} s in the queue: {not_yet.reason}")


def _needs(run: RequestRun, now_s: float) -> Needs:
    failures = run.num_transfer_failures
    return Needs(
        num_prompt_tokens=len(run.request.token_ids) + len(run.emitted),
        num_tokens_left=run.num_tokens_left,
        avoid=run.avoid,
        must_be_local=f"{failures} transfers failed" if failures >= TRANSFER_FAILURES_MAX else "",
        session=run.request.session,
        context_session=run.request.context_session,
        block_hashes=run.block_hashes,
        now_s=now_s,
    )
