"""Where one request goes next: which server prefills it, and which one decodes it. Pure decisions.

a context and a generation server      the rule
a generation server alone              little is left to compute there, it costs less, no context server is left, or
                                       transfers keep failing
a context server alone                 one token is wanted: nothing has to travel

Each hop may have a policy of its own. Where it has none, its server is the one with which the request costs least.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Collection, Sequence
from typing import Any, Final, NamedTuple

from disaggregated.block_hash import BlockHash
from orchestrator.routing.candidate import Asked, Candidate, Choice, Policy
from orchestrator.routing.decision import CANDIDATES_KEPT, NOTHING_WEIGHED, Decision, Scored
from orchestrator.routing.estimate import Estimate, Estimator, as_scored, one_token, pairs
from orchestrator.routing.local_prefill import LocalPrefill
from orchestrator.routing.near_equals import Turns
from orchestrator.server import STEPS_AHEAD, Server

STEPS_AHEAD_MAX: Final = 16
"""Of prefill on a context server that holds more of the prompt than those with room: waiting there may be worth it."""
LOCAL_GAIN: Final = 0.9
_score: Final = operator.itemgetter(Scored._fields.index("score"))


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

    def asked(self, session: str) -> Asked:
        return Asked(
            num_tokens=self.num_prompt_tokens,
            session=session,
            block_hashes=self.block_hashes,
            now_s=self.now_s,
        )


class Placement(NamedTuple):
    context: Server | None
    generation: Server | None
    why: str
    decision: Decision = NOTHING_WEIGHED

    @property
    def is_local(self) -> bool:
        return self.context is None


class NotYet(NamedTuple):
    """Nobody can take it now; `reason` is what a client whose deadline passes will read."""

    reason: str
    is_for_want_of_servers: bool = False


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
        return _Placing(self, needs).place(context, generation)


class _Placing:
    """One decision."""

    __slots__ = ("_context_policy", "_estimator", "_generation_policy", "_local", "_needs", "_turns")

    def __init__(self, placer: Placer, needs: Needs) -> None:
        self._needs = needs
        self._context_policy = placer.context_policy
        self._generation_policy = placer.generation_policy
        self._local = placer.local
        self._turns = placer.turns
        self._estimator = Estimator(needs.num_prompt_tokens, needs.block_hashes, num_tokens_left=needs.num_tokens_left)

    def place(self, context: Sequence[Server], generation: Sequence[Server]) -> Placement | NotYet:
        needs = self._needs
        prefillers = [server for server in context if server.is_ready]
        if needs.num_tokens_left == 1 and prefillers:
            return self._on_context_alone(prefillers)
        decoders = [server for server in generation if server.is_ready]
        if not decoders:
            return NotYet("no generation server is ready", is_for_want_of_servers=True)
        well = [server for server in decoders if not server.unhealthy]
        roomy = self._with_room(well or decoders)
        if not roomy:
            return NotYet(f"all {len(decoders)} generation servers are full")
        if not prefillers or needs.must_be_local:
            able = [server for server in roomy if server.can_prefill]
            if able or not prefillers:
                return self._on_generation_alone(able, needs.must_be_local if prefillers else "no context server")
        if self._local.num_uncached_max:
            short = [server for server in roomy if server.can_prefill and self._why_local(server)]
            if short:
                return self._on_generation_alone(short, "")
        return self._on_both(prefillers, roomy)

    def _why_local(self, server: Server) -> str:
        return self._local.why(self._estimator, self._needs.num_prompt_tokens, server)

    # The three ways.

    def _on_both(self, prefillers: Sequence[Server], roomy: Sequence[Server]) -> Placement | NotYet:
        free = self._free(prefillers)
        able = [server for server in roomy if server.can_prefill] if self._local.balances else []
        if not free and not able:
            return self._all_busy(prefillers)
        first = self._hop(self._context_policy if free else None, free or prefillers)
        second = self._hop(self._generation_policy, roomy)
        if not able and first.choice is not None and second.choice is not None:
            why = f"context: {first.choice.why}; generation: {second.choice.why}"
            scored = (*_scored(first.choice, is_context=True), *_scored(second.choice, is_context=False))
            return self._placement(first.servers[0], second.servers[0], why, scored)
        estimator, turns = self._estimator, self._turns
        prefills = turns.prefills(estimator.prefills(first.servers, roomy))
        both = pairs(prefills, turns.decodes(estimator.decodes(second.servers)))
        alone = self._alone([server for server in second.servers if server in able])
        best = self._best(both, alone)
        if best.context is not None and not free:
            return self._all_busy(prefillers)  # Waiting for one of them costs less than a prefill elsewhere.
        where = "" if best.context is not None else "prefilled there: "
        reasons = [f"{hop.choice.why}; " for hop in (first, second) if hop.choice is not None]
        return self._estimated(best, both + alone, where + "".join(reasons))

    def _alone(self, servers: Sequence[Server]) -> list[Estimate]:
        return self._estimator.alone(self._turns.prefills(self._estimator.prefills(servers))) if servers else []

    def _best(self, pairs: Sequence[Estimate], alone: Sequence[Estimate]) -> Estimate:
        """A generation server alone must be cheaper by a tenth: an estimate is no promise, and it disturbs."""
        pair, local = self._turns.least(pairs), self._turns.least(alone)
        assert pair is not None, "a pair of servers has room, and no estimate was made"
        return local if local is not None and local.score_s < LOCAL_GAIN * pair.score_s else pair

    def _all_busy(self, prefillers: Sequence[Server]) -> NotYet:
        return NotYet(f"all {len(prefillers)} context servers are busy")

    def _on_context_alone(self, prefillers: Sequence[Server]) -> Placement | NotYet:
        free = self._free(prefillers)
        if not free:
            return self._all_busy(prefillers)
        hop = self._hop(self._context_policy, free)
        if hop.choice is not None:
            why = f"one token is wanted; context: {hop.choice.why}"
            return self._placement(hop.servers[0], None, why, _scored(hop.choice, is_context=True))
        estimates = one_token(self._turns.prefills(self._estimator.prefills(hop.servers)))
        best = self._turns.least(estimates)
        assert best is not None, "a server has room, and no estimate was made"
        return self._estimated(best, estimates, "one token is wanted; ")

    def _on_generation_alone(self, able: Sequence[Server], because: str) -> Placement | NotYet:
        if not able:
            return NotYet(
                "no context server is ready and no generation server can prefill", is_for_want_of_servers=True
            )
        hop = self._hop(self._generation_policy, able)
        if hop.choice is not None:
            because = because or self._why_local(hop.servers[0])
            why = f"prefilled there: {because}; generation: {hop.choice.why}"
            return self._placement(None, hop.servers[0], why, _scored(hop.choice, is_context=False))
        estimates = self._alone(hop.servers)
        best = self._turns.least(estimates)
        assert best is not None, "a server has room, and no estimate was made"
        assert best.generation is not None, "prefilled on no generation server"
        because = because or self._why_local(best.generation)
        return self._estimated(best, estimates, f"prefilled there: {because}; ")

    # Who is asked.

    def _free(self, prefillers: Sequence[Server]) -> list[Server]:
        """Context servers with room. While there are any and the cost model may choose, a busy one that holds more of
        the prompt than they do is asked as well: waiting for it may be shorter than computing."""
        free = self._with_room(prefillers)
        if self._context_policy is not None or not free or len(free) == len(prefillers):
            return free
        most = max(map(self._estimator.num_held, free))
        busy = [server for server in prefillers if server not in free and self._estimator.num_held(server) > most]
        return free + self._with_room(busy, STEPS_AHEAD_MAX)

    def _with_room(self, servers: Sequence[Server], num_steps: int = STEPS_AHEAD) -> list[Server]:
        """For the prompt and the first step; a sequence that outgrows it is the engine's to preempt."""
        num_tokens = self._needs.num_prompt_tokens + 1
        return [server for server in servers if server.takes(-(-num_tokens // server.block_size), num_steps)]

    def _hop(self, policy: Policy | None, servers: Sequence[Server]) -> _Hop:
        if policy is None:
            avoid = self._needs.avoid
            others = [server for server in servers if server.instance_id not in avoid] if avoid else servers
            return _Hop(others or servers)
        choice = self._choice(policy, servers)
        return _Hop([next(server for server in servers if server.instance_id == choice.instance_id)], choice)

    def _choice(self, policy: Policy, servers: Sequence[Server]) -> Choice:
        needs = self._needs
        session = needs.context_session if policy is self._context_policy else needs.session
        candidates = [self._candidate(server, policy) for server in servers]
        return policy.choose(needs.asked(session), candidates, avoid=needs.avoid)

    def _candidate(self, server: Server, policy: Policy) -> Candidate:
        held = self._estimator.num_held(server) // server.block_size if self._needs.block_hashes else 0
        return server.as_candidate(num_cached_blocks=held)

    # What is taken.

    def _estimated(self, best: Estimate, estimates: list[Estimate], because: str) -> Placement:
        ttft_s = best.ttft_s
        cached = f", {best.num_cached} tokens cached" if best.num_cached else ""
        self._turns.taken(best)
        others = [as_scored(estimate) for estimate in estimates if estimate is not best]
        if len(others) >= CANDIDATES_KEPT:
            others = heapq.nsmallest(CANDIDATES_KEPT - 1, others, key=_score)
        return self._placement(
            best.context,
            best.generation,
            f"{because}least of {len(estimates)}: first token in {1000 * ttft_s:.1f} ms{cached}",
            (as_scored(best), *others),
            ttft_s,
        )

    def _placement(
        self,
        context: Server | None,
        generation: Server | None,
        why: str,
        weighed: tuple[tuple[Any, ...], ...],
        ttft_s: float | None = None,
    ) -> Placement:
        server = context or generation
        assert server is not None, "a placement without a server"
        held = self._estimator.num_held(server) if server.known_blocks.is_followed else None
        return Placement(context, generation, why, Decision(weighed, held, ttft_s))


class _Hop(NamedTuple):
    """The servers that one hop may go to: those with room, or the one that its policy has chosen of them."""

    servers: Sequence[Server]
    choice: Choice | None = None


def _scored(choice: Choice, *, is_context: bool) -> tuple[Scored, ...]:
    """The chosen one first, then others as the policy told them."""
    mine, scores = choice.instance_id, choice.scores
    names = [mine, *[name for name in scores if name != mine]][:CANDIDATES_KEPT] if mine in scores else []
    return tuple([Scored(name, "", scores[name]) if is_context else Scored("", name, scores[name]) for name in names])
