"""The way of serving a request that is estimated to cost least, and what is kept of all that were weighed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from orchestrator.routing.decision import Weighed
from orchestrator.routing.estimate import Estimator, Prefill, pair_costs
from orchestrator.routing.near_equals import first_decodes, first_near_least, first_prefills
from orchestrator.server import Server

LOCAL_GAIN: Final = 0.9
"""A generation server alone must be cheaper by a tenth: an estimate is no promise, and it disturbs."""


Least = tuple[Server | None, Server | None, float, float, Weighed]
"""The context and the generation server, the estimated time to first token, the score, and what is kept."""


def least_of(
    estimator: Estimator,
    contexts: Sequence[Server],
    generations: Sequence[Server],
    *,
    holders: Sequence[Server],
    alone: Sequence[Server] = (),
) -> Least:
    """Of pairs, and of generation servers `alone`. holders: whose blocks could be brought to a context server."""
    pair = _of_pairs(estimator, contexts, generations, holders)
    if not alone:
        return pair
    context, generation, ttft_s, score_s, pairs = pair
    _, local, local_ttft_s, local_score_s, locals_ = least_alone(estimator, alone)
    if local_score_s < LOCAL_GAIN * score_s:
        taken = len(pairs.gaps_s) + locals_.taken
        return None, local, local_ttft_s, local_score_s, pairs._replace(taken=taken, alone=locals_.alone)
    return context, generation, ttft_s, score_s, pairs._replace(alone=locals_.alone)


def _of_pairs(
    estimator: Estimator, contexts: Sequence[Server], generations: Sequence[Server], holders: Sequence[Server]
) -> Least:
    prefills = first_prefills(estimator.prefills(contexts, holders))
    decodes = first_decodes(estimator.decodes(generations))
    gaps_s, scores = pair_costs(prefills, decodes)
    taken = first_near_least(scores)
    first, second = divmod(taken, len(decodes))
    kept = (taken, [row[6:] for row in prefills], [row[4] for row in decodes], gaps_s, ())
    weighed = tuple.__new__(Weighed, kept)  # As Weighed(*kept), in a third of the time.
    _, _, _, _, _, context, _, _, queue_s, compute_s = prefills[first]
    return context, decodes[second][3], queue_s + compute_s, scores[taken], weighed


def least_alone(estimator: Estimator, servers: Sequence[Server]) -> Least:
    """Of generation servers that do everything."""
    prefills = first_prefills(estimator.prefills(servers))
    ways = [(*row[6:], *estimator.alone_s(row[5], row[9])) for row in prefills]
    scores = [queue_s + compute_s + gap_s + harm_s for _, _, queue_s, compute_s, gap_s, harm_s in ways]
    taken = first_near_least(scores)
    return None, prefills[taken][5], _ttft_s(prefills[taken]), scores[taken], Weighed(taken, alone=ways)


def least_for_one_token(estimator: Estimator, contexts: Sequence[Server]) -> Least:
    """Of context servers, whose first token is all that is wanted: nothing has to be decoded."""
    prefills = first_prefills(estimator.prefills(contexts))
    scores = [_ttft_s(row) for row in prefills]
    taken = first_near_least(scores)
    weighed = Weighed(taken, [row[6:] for row in prefills], ("",), [0.0] * len(prefills))
    return prefills[taken][5], None, scores[taken], scores[taken], weighed


def _ttft_s(row: Prefill) -> float:
    *_, queue_s, compute_s = row
    return queue_s + compute_s
