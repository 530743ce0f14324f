"""Where one request goes next: which server prefills it, and which one decodes it. Pure decisions.

a context and a generation server      the rule
a generation server alone              a short uncached prompt, no context server left, or transfers that keep failing
a context server alone                 one token is wanted: nothing has to travel
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence

from orchestrator.policies import Policy
from orchestrator.server import Server


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What one attempt asks for."""

    num_prompt_tokens: int
    """Those already generated included, when the request goes on after a loss."""
    num_tokens_left: int
    why_local: Callable[[Server], str] = lambda _: ""
    """Why the prompt is better prefilled on that generation server, although a context server could; "": it is not."""
    avoid: Collection[str] = ()
    """Instances that just failed this request."""
    num_cached_blocks: Callable[[Server], int] = lambda _: 0
    """Of the prompt, that the server is known to hold."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    context: Server | None
    generation: Server | None
    why: str

    @property
    def is_local(self) -> bool:
        return self.context is None


@dataclasses.dataclass(frozen=True, slots=True)
class NotYet:
    """Nobody can take it now; `reason` is what a client whose deadline passes will read."""

    reason: str
    is_for_want_of_servers: bool = False


class Placer:
    """Holds the turns of the two policies, one for each hop."""

    def __init__(self, context_policy: Policy, generation_policy: Policy) -> None:
        self._context_policy = context_policy
        self._generation_policy = generation_policy

    def place(self, needs: Needs, context: Sequence[Server], generation: Sequence[Server]) -> Placement | NotYet:
        prefillers = [server for server in context if server.is_ready]
        if needs.num_tokens_left == 1 and prefillers:
            return self._on_context_alone(needs, prefillers)
        decoders = [server for server in generation if server.is_ready]
        if not decoders:
            return NotYet("no generation server is ready", is_for_want_of_servers=True)
        well = [server for server in decoders if not server.unhealthy]
        roomy = _with_room(needs, well or decoders)
        if not roomy:
            return NotYet(f"all {len(decoders)} generation servers are full")
        able = [server for server in roomy if server.description.can_prefill]
        if not prefillers:
            return self._on_generation_alone(needs, able, lambda _: "no context server")
        if better := [server for server in able if needs.why_local(server)]:
            return self._on_generation_alone(needs, better, needs.why_local)
        return self._on_both(needs, prefillers, roomy)

    def _on_both(self, needs: Needs, prefillers: Sequence[Server], roomy: Sequence[Server]) -> Placement | NotYet:
        free = _with_room(needs, prefillers)
        if not free:
            return NotYet(f"all {len(prefillers)} context servers are busy")
        first, first_why = _choose(self._context_policy, free, needs.avoid)
        second, second_why = _choose(self._generation_policy, roomy, needs.avoid, needs.num_cached_blocks)
        return Placement(context=first, generation=second, why=f"context: {first_why}; generation: {second_why}")

    def _on_context_alone(self, needs: Needs, prefillers: Sequence[Server]) -> Placement | NotYet:
        free = _with_room(needs, prefillers)
        if not free:
            return NotYet(f"all {len(prefillers)} context servers are busy")
        chosen, why = _choose(self._context_policy, free, needs.avoid)
        return Placement(context=chosen, generation=None, why=f"one token is wanted; context: {why}")

    def _on_generation_alone(
        self, needs: Needs, able: Sequence[Server], because: Callable[[Server], str]
    ) -> Placement | NotYet:
        if not able:
            return NotYet(
                "no context server is ready and no generation server can prefill", is_for_want_of_servers=True
            )
        chosen, why = _choose(self._generation_policy, able, needs.avoid)
        return Placement(context=None, generation=chosen, why=f"prefilled there: {because(chosen)}; generation: {why}")


def _choose(
    policy: Policy,
    servers: Sequence[Server],
    avoid: Collection[str],
    num_cached_blocks: Callable[[Server], int] = lambda _: 0,
) -> tuple[Server, str]:
    by_name = {server.instance_id: server for server in servers}
    candidates = [server.as_candidate(num_cached_blocks=num_cached_blocks(server)) for server in servers]
    choice = policy.choose(candidates, avoid=avoid)
    return by_name[choice.instance_id], choice.why


def _with_room(needs: Needs, servers: Sequence[Server]) -> list[Server]:
    return [server for server in servers if server.has_room(num_blocks=_num_blocks(needs, server))]


def _num_blocks(needs: Needs, server: Server) -> int:
    """Room for the prompt and the first step; a sequence that outgrows it is the engine's to preempt."""
    return -(-(needs.num_prompt_tokens + 1) // server.description.layout.block_size)
