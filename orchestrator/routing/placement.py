"""Where one request goes next: which server prefills it, and which one decodes it. Pure decisions.

a context and a generation server      the rule
a generation server alone              little is left to compute there, it costs less, no context server is left, or
                                       transfers keep failing
a context server alone                 one token is wanted: nothing has to travel

Each hop may have a policy of its own. Where it has none, its server is the one with which the request costs least.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Final

from disaggregated.block_hash import BlockHash
from orchestrator.routing.candidate import Asked, Candidate, Choice, Policy
from orchestrator.routing.decision import CANDIDATES_KEPT, Decision, Scored
from orchestrator.routing.estimate import Estimate, Estimator
from orchestrator.routing.local_prefill import LocalPrefill
from orchestrator.routing.near_equals import Turns
from orchestrator.server import Server

STEPS_AHEAD_MAX: Final = 16
"""Of prefill on a context server that holds more of the prompt than those with room: waiting there may be worth it."""
LOCAL_GAIN: Final = 0.9


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    context: Server | None
    generation: Server | None
    why: str
    decision: Decision = Decision()

    @property
    def is_local(self) -> bool:
        return self.context is None


@dataclasses.dataclass(frozen=True, slots=True)
class NotYet:
    """Nobody can take it now; `reason` is what a client whose deadline passes will read."""

    reason: str
    is_for_want_of_servers: bool = False


class Placer:
    """Holds the policies of the two hops, with whatever they remember. None: the cost model chooses that hop."""

    def __init__(
        self, context_policy: Policy | None, generation_policy: Policy | None, local: LocalPrefill | None = None
    ) -> None:
        self._context_policy = context_policy
        self._generation_policy = generation_policy
        self._local = local or LocalPrefill()
        self._turns = Turns()

    @property
    def wants_blocks(self) -> bool:
        """Some choice depends on which blocks servers hold."""
        policies = (self._context_policy, self._generation_policy)
        return self._local.is_on or any(policy is None or policy.wants_blocks for policy in policies)

    def place(self, needs: Needs, context: Sequence[Server], generation: Sequence[Server]) -> Placement | NotYet:
        placing = _Placing(needs, self._context_policy, self._generation_policy, self._local, self._turns)
        return placing.place(context, generation)


class _Placing:
    """One decision."""

    def __init__(
        self,
        needs: Needs,
        context_policy: Policy | None,
        generation_policy: Policy | None,
        local: LocalPrefill,
        turns: Turns,
    ) -> None:
        self._needs = needs
        self._context_policy = context_policy
        self._generation_policy = generation_policy
        self._local = local
        self._turns = turns
        self._estimator = Estimator(needs.asked(needs.session), num_tokens_left=needs.num_tokens_left)

    def place(self, context: Sequence[Server], generation: Sequence[Server]) -> Placement | NotYet:
        prefillers = [server for server in context if server.is_ready]
        if self._needs.num_tokens_left == 1 and prefillers:
            return self._on_context_alone(prefillers)
        decoders = [server for server in generation if server.is_ready]
        if not decoders:
            return NotYet("no generation server is ready", is_for_want_of_servers=True)
        well = [server for server in decoders if not server.unhealthy]
        roomy = self._with_room(well or decoders)
        if not roomy:
            return NotYet(f"all {len(decoders)} generation servers are full")
        able = [server for server in roomy if server.description.can_prefill]
        must_be_local = self._needs.must_be_local if prefillers else "no context server"
        short = [server for server in able if self._why_local(server)]
        if must_be_local and (able or not prefillers):
            return self._on_generation_alone(able, must_be_local)
        return self._on_generation_alone(short, "") if short else self._on_both(prefillers, roomy)

    def _why_local(self, server: Server) -> str:
        return self._local.why(self._estimator, self._needs.num_prompt_tokens, server)

    # The three ways.

    def _on_both(self, prefillers: Sequence[Server], roomy: Sequence[Server]) -> Placement | NotYet:
        free = self._free(prefillers)
        able = [server for server in roomy if server.description.can_prefill] if self._local.balances else []
        if not free and not able:
            return self._all_busy(prefillers)
        first = _Hop(self._context_policy if free else None, free or prefillers, self)
        second = _Hop(self._generation_policy, roomy, self)
        if not able and first.choice is not None and second.choice is not None:
            why = f"context: {first.choice.why}; generation: {second.choice.why}"
            scored = [*first.scored("context"), *second.scored("generation")]
            return self._placement(first.servers[0], second.servers[0], why, scored)
        pairs = self._estimator.pairs(self._estimator.prefills(first.servers, roomy), second.servers)
        alone = self._estimator.alone([server for server in second.servers if server in able])
        best = self._best(pairs, alone)
        if best.context is not None and not free:
            return self._all_busy(prefillers)  # Waiting for one of them costs less than a prefill elsewhere.
        return self._estimated(best, pairs + alone, first, second)

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
        hop = _Hop(self._context_policy, free, self)
        if hop.choice is not None:
            why = f"one token is wanted; context: {hop.choice.why}"
            return self._placement(hop.servers[0], None, why, hop.scored("context"))
        estimates = self._estimator.one_token(self._estimator.prefills(hop.servers))
        best = self._turns.least(estimates)
        assert best is not None, "a server has room, and no estimate was made"
        return self._estimated(best, estimates, hop, hop, why="one token is wanted; ")

    def _on_generation_alone(self, able: Sequence[Server], because: str) -> Placement | NotYet:
        if not able:
            return NotYet(
                "no context server is ready and no generation server can prefill", is_for_want_of_servers=True
            )
        hop = _Hop(self._generation_policy, able, self)
        if hop.choice is not None:
            because = because or self._why_local(hop.servers[0])
            why = f"prefilled there: {because}; generation: {hop.choice.why}"
            return self._placement(None, hop.servers[0], why, hop.scored("generation"))
        estimates = self._estimator.alone(hop.servers)
        best = self._turns.least(estimates)
        assert best is not None, "a server has room, and no estimate was made"
        because = because or self._why_local(best.prefill.server)
        return self._estimated(best, estimates, hop, hop, why=f"prefilled there: {because}; ")

    # Who is asked.

    def _free(self, prefillers: Sequence[Server]) -> list[Server]:
        """Context servers with room. While there are any and the cost model may choose, a busy one that holds more of
        the prompt than they do is asked as well: waiting for it may be shorter than computing."""
        free = self._with_room(prefillers)
        if self._context_policy is not None or not free or len(free) == len(prefillers):
            return free
        most = max(map(self._estimator.num_held, free))
        busy = [server for server in prefillers if server not in free and self._estimator.num_held(server) > most]
        return free + self._with_room(busy, num_steps=STEPS_AHEAD_MAX)

    def _with_room(self, servers: Sequence[Server], **patience: int) -> list[Server]:
        return [server for server in servers if server.has_room(num_blocks=self._num_blocks(server), **patience)]

    def _num_blocks(self, server: Server) -> int:
        """Room for the prompt and the first step; a sequence that outgrows it is the engine's to preempt."""
        return -(-(self._needs.num_prompt_tokens + 1) // server.block_size)

    def policy_choice(self, policy: Policy, servers: Sequence[Server]) -> Choice:
        needs = self._needs
        session = needs.context_session if policy is self._context_policy else needs.session
        candidates = [self._candidate(server, policy) for server in servers]
        return policy.choose(needs.asked(session), candidates, avoid=needs.avoid)

    def _candidate(self, server: Server, policy: Policy) -> Candidate:
        held = self._estimator.num_held(server) // server.block_size if self._needs.block_hashes else 0
        return server.as_candidate(num_cached_blocks=held, counts_tokens=policy.wants_tokens)

    def not_avoided(self, servers: Sequence[Server]) -> Sequence[Server]:
        avoid = self._needs.avoid
        return [server for server in servers if server.instance_id not in avoid] or servers if avoid else servers

    # What is taken.

    def _estimated(
        self, best: Estimate, estimates: Sequence[Estimate], first: _Hop, second: _Hop, why: str = ""
    ) -> Placement:
        reasons = [hop.choice.why for hop in dict.fromkeys((first, second)) if hop.choice is not None]
        prefill = best.prefill
        cached = f", {prefill.num_cached} tokens cached" if prefill.num_cached else ""
        least = f"least of {len(estimates)}: first token in {1000 * prefill.ttft_s:.1f} ms{cached}"
        where = "" if best.context is not None or why else "prefilled there: "
        self._turns.taken(best)
        others = sorted((each for each in estimates if each is not best), key=_score)[: CANDIDATES_KEPT - 1]
        return self._placement(
            best.context,
            best.generation,
            why + where + "; ".join([*reasons, least]),
            [best.scored(), *(estimate.scored() for estimate in others)],
            ttft_s=prefill.ttft_s,
        )

    def _placement(
        self,
        context: Server | None,
        generation: Server | None,
        why: str,
        scored: Sequence[Scored],
        *,
        ttft_s: float | None = None,
    ) -> Placement:
        server = context or generation
        assert server is not None, "a placement without a server"
        held = self._estimator.num_held(server) if server.known_blocks.is_followed else None
        decision = Decision(candidates=tuple(scored), num_cached_tokens=held, ttft_s=ttft_s)
        return Placement(context=context, generation=generation, why=why, decision=decision)


def _score(estimate: Estimate) -> float:
    return estimate.score_s


class _Hop:
    """The servers that one hop may go to: those with room, or the one that its policy has chosen of them."""

    def __init__(self, policy: Policy | None, servers: Sequence[Server], placing: _Placing) -> None:
        self.choice = placing.policy_choice(policy, servers) if policy is not None and servers else None
        if self.choice is None:
            self.servers = placing.not_avoided(servers)
        else:
            instance_id = self.choice.instance_id
            self.servers = [next(server for server in servers if server.instance_id == instance_id)]

    def scored(self, role: str) -> list[Scored]:
        if self.choice is None:
            return []
        mine = self.choice.instance_id
        names = sorted(self.choice.scores, key=lambda name: name != mine)[:CANDIDATES_KEPT]
        score_of = self.choice.scores
        if role == "context":
            return [Scored(context=name, generation="", score=score_of[name], parts={}) for name in names]
        return [Scored(context="", generation=name, score=score_of[name], parts={}) for name in names]
