"""The first server of a session, the same whoever is asked: several orchestrators share no table, and need none.

Each server draws a number from the session's name and its own, and the highest has it (Thaler and Ravishankar, A Name-
Based Mapping Scheme for Rendezvous, 1996): when a server comes or goes, only the sessions that it has or had move. A
server with far more than its share of the requests is passed over (Mirrokni, Thorup and Zadimoghaddam, Consistent
Hashing with Bounded Loads, 2018), so that no draw makes a hot spot; then two orchestrators that know different loads
may disagree for a while, which costs a prefill and no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import xxhash

from orchestrator.routing.candidate import Candidate

SHARE_MAX: Final = 1.5
"""Of the requests that each would have if all had as many."""
SLACK: Final = 2.0
"""Requests beyond that: a few on one server are no hot spot."""


def rendezvous(session: str, candidates: Sequence[Candidate]) -> Candidate:
    """Of at least one candidate. There is always one with room under the bound: the one with the fewest requests."""
    total = sum([candidate.num_requests for candidate in candidates])
    load_max = SHARE_MAX * total / len(candidates) + SLACK
    ranked = sorted(candidates, key=lambda candidate: _draw(session, candidate.instance_id), reverse=True)
    return next(candidate for candidate in ranked if candidate.num_requests <= load_max)


def _draw(session: str, instance_id: str) -> int:
    """Equal in every process, unlike `hash`. Lengths keep apart names that would read alike when put together."""
    return xxhash.xxh3_64_intdigest(f"{len(session)}:{session}{instance_id}".encode(errors="surrogatepass"))
