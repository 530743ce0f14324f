from __future__ import annotations

import itertools

import pytest

from disaggregated.request_life import NEXT, InvalidTransition, Phase, RequestLife

PATHS = {
    Phase.QUEUED: (),
    Phase.PREFILLING: (Phase.PREFILLING,),
    Phase.TRANSFERRING: (Phase.PREFILLING, Phase.TRANSFERRING),
    Phase.DECODING: (Phase.PREFILLING, Phase.DECODING),
    Phase.FINISHED: (Phase.PREFILLING, Phase.FINISHED),
    Phase.FAILED: (Phase.FAILED,),
    Phase.CANCELLED: (Phase.CANCELLED,),
}


def life_in(phase: Phase) -> RequestLife:
    life = RequestLife("r1", now_s=0.0)
    for step in PATHS[phase]:
        life.advance(step, now_s=1.0)
    return life


@pytest.mark.parametrize(("before", "after"), list(itertools.product(Phase, Phase)))
def test_every_pair_of_phases_is_allowed_or_refused_by_the_table(before: Phase, after: Phase) -> None:
    life = life_in(before)
    if after in NEXT[before]:
        life.advance(after, now_s=2.0)
        assert life.phase is after
    else:
        with pytest.raises(InvalidTransition, match=f"r1: {before} -> {after}"):
            life.advance(after, now_s=2.0)
        assert life.phase is before
    life.check_integrity()


def test_every_phase_that_is_not_an_end_can_be_stopped() -> None:
    ends = {phase for phase in Phase if not NEXT[phase]}
    assert ends == {Phase.FINISHED, Phase.FAILED, Phase.CANCELLED}
    assert all({Phase.FAILED, Phase.CANCELLED} <= NEXT[phase] for phase in set(Phase) - ends)


def test_the_time_in_a_phase_adds_up_over_all_visits() -> None:
    life = RequestLife("r1", now_s=10.0)
    for now_s, phase in (
        (11.0, Phase.PREFILLING),
        (13.0, Phase.QUEUED),
        (13.5, Phase.PREFILLING),
        (14.0, Phase.DECODING),
    ):
        life.advance(phase, now_s=now_s)
    assert life.seconds_in(Phase.QUEUED, now_s=20.0) == pytest.approx(1.5)
    assert life.seconds_in(Phase.PREFILLING, now_s=20.0) == pytest.approx(2.5)
    assert life.seconds_in(Phase.DECODING, now_s=20.0) == pytest.approx(6.0)
    life.advance(Phase.FINISHED, now_s=15.0)
    assert life.seconds_in(Phase.DECODING, now_s=20.0) == pytest.approx(1.0)
    assert life.is_over
