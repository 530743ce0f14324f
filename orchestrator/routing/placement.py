"""Where one request goes next: which server prefills it, and which one decodes it. Pure decisions.

a context and a generation server      the rule
a generation server alone              little is left to compute there, it costs less, no context server is left, or
                                       transfers keep failing
a context server alone                 one token is wanted: nothing has to travel

Each hop may have a policy of its own. Where it has none, its server is the one with which the request costs least.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final, NamedTuple

from disaggregated.block_hash import BlockHash
from orchestrator.routing.candidate import Asked, Choice, Policy, num_blocks_held
from orchestrator.routing.decision import NOTHING_WEIGHED, Decision
from orchestrator.routing.estimate import Estimator
from orchestrator.routing.least import Least, least_alone, least_for_one_token, least_of
from orchestrator.routing.local_prefill import LocalPrefill
from orchestrator.routing.near_equals import Turns
from orchestrator.server import Server

STEPS_AHEAD_MAX: Final = 16
"""Of prefill on a context server that holds more of the prompt than those with room: waiting there may be worth it."""


class Needs(NamedTuple):
    """What one attempt asks for."""

    num_prompt_tokens: int
    """Those already generated included, when the request goes on after a loss."""
    num_tokens_left: int
    avoid: Collection[str] = ()
    """Instances that just failed this request."""
    must_be_local: str = ""
    """Why its prompt must not travel; "": it may."""
    session: str = ""
    context_session: str = ""
    block_hashes: Sequence[BlockHash] = ()
    now_s: float = 0.0


class Placement(NamedTuple):
    context: Server | None
    generation: Server | None
    decision: Decision = NOTHING_WEIGHED

    @property
    def why(self) -> str:
        return self.decision.why

    @property
    def is_local(self) -> bool:
        return self.context is None


class NotYet(NamedTuple):
    """Nobody can take it now; `reason` is what a client whose deadline passes will read."""

    reason: str
    is_for_want_of_servers: bool = False


# Named tuples are made by `tuple.__new__` where each request makes some: in a third of the time.


class Placer:
    """Holds the policies of the two hops, with whatever they remember. None: the cost model chooses that hop."""

    def __init__(
        self, context_policy: Policy | None, generation_policy: Policy | None, local: LocalPrefill | None = None
    ) -> None:
        self.context_policy = context_policy
        self.generation_policy = generation_policy
        self.local = local or LocalPrefill()
        self.turns = Turns()

    @property
    def wants_blocks(self) -> bool:
        """Some choice depends on which blocks servers hold."""
        policies = (self.context_policy, self.generation_policy)
        return self.local.is_on or any(policy is None or policy.wants_blocks for policy in policies)

    def place(self, needs: Needs, context: Sequence[Server], generation: Sequence[Server]) -> Placement | NotYet:
        prefillers, free = _ready(context, needs)
        if needs.num_tokens_left == 1 and prefillers:
            return self._on_context_alone(needs, prefillers, free)
        decoders, roomy = _ready(generation, needs)
        if not decoders:
            return NotYet("no generation server is ready", is_for_want_of_servers=True)
        unwell = [server for server in decoders if server.unhealthy]
        if unwell and len(unwell) < len(decoders):
            roomy = [server for server in roomy if not server.unhealthy]
        if not roomy:
            return NotYet(f"all {len(decoders)} generation servers are full")
        if not prefillers or needs.must_be_local:
            able = [server for server in roomy if server.can_prefill]
            if able or not prefillers:
                because = needs.must_be_local if prefillers else "no context server"
                return self._on_generation_alone(needs, able, because)
        if self.local.num_uncached_max:
            short = [server for server in roomy if server.can_prefill and self._why_local(needs, server)]
            if short:
                return self._on_generation_alone(needs, short, "")
        return self._on_both(needs, prefillers, free, roomy)

    def _why_local(self, needs: Needs, server: Server) -> str:
        return self.local.why(needs.num_prompt_tokens, _num_held(needs, server))

    # The three ways.

    def _on_both(
        self, needs: Needs, prefillers: Sequence[Server], free: list[Server], roomy: list[Server]
    ) -> Placement | NotYet:
        if free and len(free) < len(prefillers) and self.context_policy is None:
            free = _with_those_worth_waiting_for(free, prefillers, needs)
        able = [server for server in roomy if server.can_prefill] if self.local.balances else []
        if not free and not able:
            return _all_busy(prefillers)
        context_policy = self.context_policy if free else None
        contexts, first = _hop(context_policy, free or prefillers, needs, needs.context_session)
        generations, second = _hop(self.generation_policy, roomy, needs, needs.session)
        if not able and first is not None and second is not None:
            return _placed(needs, (contexts[0], generations[0]), (first, second))
        alone = [server for server in generations if server in able] if able else ()
        found = least_of(self._estimator(needs), contexts, generations, holders=roomy, alone=alone)
        is_local = found[0] is None
        if not free and not is_local:
            return _all_busy(prefillers)  # Waiting for one of them costs less than a prefill elsewhere.
        return self._estimated(needs, found, "prefilled there: " if is_local else "", first, second)

    def _on_context_alone(self, needs: Needs, prefillers: Sequence[Server], free: list[Server]) -> Placement | NotYet:
        if not free:
            return _all_busy(prefillers)
        if len(free) < len(prefillers) and self.context_policy is None:
            free = _with_those_worth_waiting_for(free, prefillers, needs)
        because = "one token is wanted; "
        servers, choice = _hop(self.context_policy, free, needs, needs.context_session)
        if choice is not None:
            return _placed(needs, (servers[0], None), (choice, None), because)
        return self._estimated(needs, least_for_one_token(self._estimator(needs), servers), because)

    def _on_generation_alone(self, needs: Needs, able: Sequence[Server], because: str) -> Placement | NotYet:
        if not able:
            return NotYet(
                "no context server is ready and no generation server can prefill", is_for_want_of_servers=True
            )
        servers, choice = _hop(self.generation_policy, able, needs, needs.session)
        if choice is not None:
            because = because or self._why_local(needs, servers[0])
            return _placed(needs, (None, servers[0]), (None, choice), f"prefilled there: {because}; ")
        found = least_alone(self._estimator(needs), servers)
        _, generation, *_ = found
        assert generation is not None, "prefilled on no generation server"
        because = because or self._why_local(needs, generation)
        return self._estimated(needs, found, f"prefilled there: {because}; ")

    # By what they cost.

    def _estimator(self, needs: Needs) -> Estimator:
        return Estimator(needs.num_prompt_tokens, needs.block_hashes, needs.num_tokens_left, self.turns.taken)

    def _estimated(
        self, needs: Needs, least: Least, because: str, first: Choice | None = None, second: Choice | None = None
    ) -> Placement:
        context, generation, ttft_s, _, weighed = least
        self.turns.take(context, generation)
        cached = _predicted(needs, context or generation)
        decision = (cached, ttft_s, because, first, second, weighed)
        return tuple.__new__(Placement, (context, generation, tuple.__new__(Decision, decision)))


def _placed(
    needs: Needs,
    servers: tuple[Server | None, Server | None],
    choices: tuple[Choice | None, Choice | None],
    because: str = "",
) -> Placement:
    """By policies: the context server first, and what its policy said."""
    context, generation = servers
    decision = (_predicted(needs, context or generation), None, because, *choices, None)
    return tuple.__new__(Placement, (context, generation, tuple.__new__(Decision, decision)))


def _predicted(needs: Needs, server: Server | None) -> int | None:
    """Cached tokens, at whoever prefills; None: its blocks are not followed."""
    assert server is not None, "a placement without a server"
    known = server.known_blocks
    if not known.is_followed:
        return None
    return _num_held(needs, server) if known.num_blocks else 0


def _num_held(needs: Needs, server: Server) -> int:
    """Tokens."""
    return server.block_size * num_blocks_held(server, needs.num_prompt_tokens, needs.block_hashes)


def _ready(servers: Sequence[Server], needs: Needs) -> tuple[list[Server], list[Server]]:
    """Those that are ready, and of them those with room for the prompt and the first step; a sequence that outgrows it
    is the engine's to preempt."""
    num_tokens = needs.num_prompt_tokens + 1
    ready, roomy = [], []
    for server in servers:
        if server.is_ready:
            ready.append(server)
            if server.takes(-(-num_tokens // server.block_size)):
                roomy.append(server)
    return ready, roomy


def _with_those_worth_waiting_for(free: list[Server], prefillers: Sequence[Server], needs: Needs) -> list[Server]:
    """A busy context server that holds more of the prompt than those with room is asked as well: waiting for it may be
    shorter than computing."""
    num_tokens = needs.num_prompt_tokens + 1
    most = max([_num_held(needs, server) for server in free])
    busy = [server for server in prefillers if server not in free and _num_held(needs, server) > most]
    return free + [each for each in busy if each.takes(-(-num_tokens // each.block_size), STEPS_AHEAD_MAX)]


def _all_busy(prefillers: Sequence[Server]) -> NotYet:
    return NotYet(f"all {len(prefillers)} context servers are busy")


def _hop(
    policy: Policy | None, servers: Sequence[Server], needs: Needs, session: str
) -> tuple[Sequence[Server], Choice | None]:
    """The servers that one hop may go to: those with room, or the one that its policy has chosen of them."""
    avoid = needs.avoid
    if policy is None:
        others = [server for server in servers if server.instance_id not in avoid] if avoid else servers
        return others or servers, None
    asked = tuple.__new__(Asked, (needs.num_prompt_tokens, session, needs.block_hashes, needs.now_s))
    choice = policy.choose(asked, servers, avoid=avoid)
    chosen = choice.instance_id
    return [server for server in servers if server.instance_id == chosen], choice
