"""What holds for every router, whatever the servers have and whichever of them are there."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disaggregated.block_hash import block_hashes
from disaggregated.config.deployment import RouterConfig
from disaggregated.config.router_keys import ROUTERS
from orchestrator.routing.local_prefill import LocalPrefill
from orchestrator.routing.make import make_policy
from orchestrator.routing.placement import STEPS_AHEAD_MAX, Needs, NotYet, Placement, Placer
from orchestrator.server import Role, Server
from tests.unit.orchestrator.routing.servers import holds, server, share

PROMPT = list(range(200))
HASHES = list(block_hashes(PROMPT, 16))


def router(kind: str) -> RouterConfig:
    return RouterConfig(type=kind, args={"weights": {"c0": 1.0, "g0": 2.0}} if kind == "weighted" else {})


def some_servers(role: Role, dice: random.Random) -> list[Server]:
    """Up to three: slow and quick, empty and full, some draining, some that hold the prompt's beginning."""
    made = []
    for number in range(dice.randint(0, 3)):
        speed = {"has_step_cost": dice.random() < 0.5, "step_token_s": 10 ** dice.uniform(-6, -3)}
        told = {"num_running": dice.randint(0, 3), "num_blocks_free": dice.choice([5, 100]), **speed}
        one = server(role, f"{role[0]}{number}", heartbeat=told, can_prefill=dice.random() < 0.7)
        if dice.random() < 0.7:
            holds(one, HASHES[: dice.randint(0, 12)])
        for key in range(dice.randint(0, 4)):
            one.take(key, share(num_tokens=100, num_prefill_tokens=dice.choice([0, 30, 100])))
        if dice.random() < 0.15:
            one.heard(one.heartbeat.__class__(epoch=1, draining=True, num_blocks_free=100), now_s=1.0)
        made.append(one)
    return made


@pytest.mark.parametrize("kind", ROUTERS)
@given(seed=st.integers(0, 1_000_000))
def test_whoever_is_chosen_is_ready_and_has_room_and_nobody_waits_while_a_pair_is_free(kind: str, seed: int) -> None:
    dice = random.Random(seed)
    contexts, generations = some_servers(Role.CONTEXT, dice), some_servers(Role.GENERATION, dice)
    local = LocalPrefill(num_uncached_max=dice.choice([0, 30]), balances=dice.random() < 0.3)
    placer = Placer(make_policy(router(kind)), make_policy(router(kind)), local)
    needs = Needs(
        num_prompt_tokens=200, num_tokens_left=dice.choice([1, 2, 50]), block_hashes=HASHES, session=dice.choice("ab-")
    )
    found = placer.place(needs, contexts, generations)
    free = [one for one in contexts if one.has_room(num_blocks=13)]
    roomy = [one for one in generations if one.has_room(num_blocks=13)]
    if isinstance(found, NotYet):
        assert found.reason
        assert not (free and roomy), found
        return
    assert_sound(found, needs, contexts, generations, roomy)


def assert_sound(
    found: Placement, needs: Needs, contexts: list[Server], generations: list[Server], roomy: list[Server]
) -> None:
    assert found.why
    assert found.context is not None or found.generation is not None
    if found.context is not None:
        assert found.context in contexts
        assert found.context.has_room(num_blocks=13, num_steps=STEPS_AHEAD_MAX)
    if found.generation is None:
        assert needs.num_tokens_left == 1
    else:
        assert found.generation in roomy
        assert found.context is not None or found.generation.description.can_prefill
    first = found.decision.candidates[0] if found.decision.candidates else None
    if first is not None and first.context:
        assert found.context is not None
        assert first.context == found.context.instance_id
    assert len(found.decision.candidates) <= 16
    predicted = found.decision.num_cached_tokens
    assert predicted is None or (predicted < needs.num_prompt_tokens and predicted % 16 == 0)
