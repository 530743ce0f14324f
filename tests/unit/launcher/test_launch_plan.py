"""The launcher's decisions, in virtual time."""

from __future__ import annotations

import random

import pytest

from disaggregated.errors import ModelUnavailable
from orchestrator.launch_plan import (
    Decision,
    Drain,
    Join,
    Kill,
    LaunchLimits,
    LaunchPlan,
    Leave,
    Phase,
    Start,
    Terminate,
)

LIMITS = LaunchLimits(
    start_timeout_s=60, drain_timeout_s=20, stop_timeout_s=3, backoff_first_s=1, backoff_max_s=30, stable_s=10
)


def plan_with(role: str = "generation", *, ready: int) -> LaunchPlan:
    plan = LaunchPlan(LIMITS)
    for start in plan.scale(role, ready, now_s=0.0):
        assert isinstance(start, Start)
        plan.ready(start.name, f"host:{start.name}", now_s=1.0)
    plan.check_integrity()
    return plan


def phases(plan: LaunchPlan) -> dict[str, str]:
    return {name: str(instance.phase) for name, instance in plan.instances.items()}


def test_wanted_servers_are_started_and_join_when_ready() -> None:
    plan = LaunchPlan(LIMITS)
    assert plan.scale("context", 2, now_s=0.0) == [Start("context-0", "context"), Start("context-1", "context")]
    assert plan.ready("context-0", "h:1", now_s=1.0) == [Join("context", "h:1")]
    assert not plan.is_settled("context")
    plan.ready("context-1", "h:2", now_s=1.0)
    assert plan.is_settled("context")
    assert plan.next_deadline_s() is None


def test_a_crashed_server_leaves_and_starts_again_at_once() -> None:
    plan = plan_with(ready=1)
    assert plan.exited("generation-0", -9, now_s=100.0) == [Leave("generation", "host:generation-0")]
    assert plan.next_deadline_s() == 100.0
    assert plan.wake(now_s=100.0) == [Start("generation-0", "generation")]
    assert plan.instances["generation-0"].restarts == 1
    assert plan.instances["generation-0"].last_exit == "signal 9"


def test_a_crash_loop_slows_down_to_one_start_in_half_a_minute() -> None:
    plan = plan_with(ready=1)
    now_s, waits = 100.0, []
    for _ in range(40):
        plan.exited("generation-0", 1, now_s=now_s)
        due_s = plan.next_deadline_s()
        assert due_s is not None
        waits.append(due_s - now_s)
        assert plan.wake(now_s=due_s - 0.01) == [] or waits[-1] == 0
        now_s = due_s
        if plan.instances["generation-0"].phase is Phase.WAITING:
            plan.wake(now_s=now_s)
        plan.check_integrity()
    assert waits[:7] == [0, 1, 2, 4, 8, 16, 30]
    assert set(waits[7:]) == {30}


def test_a_server_that_ran_well_for_a_while_starts_with_a_clean_slate() -> None:
    plan = plan_with(ready=1)
    for _ in range(4):
        plan.exited("generation-0", 1, now_s=2.0)
        plan.wake(now_s=100.0)
    plan.ready("generation-0", "h:1", now_s=100.0)
    plan.exited("generation-0", 1, now_s=100.0 + LIMITS.stable_s)
    assert plan.instances["generation-0"].failures_in_a_row == 1
    assert plan.next_deadline_s() == 110.0


def test_a_server_that_says_it_cannot_start_is_not_started_again() -> None:
    plan = LaunchPlan(LIMITS)
    plan.scale("context", 1, now_s=0.0)
    assert plan.exited("context-0", ModelUnavailable.exit_code, now_s=1.0) == []
    assert plan.instances["context-0"].phase is Phase.FAILED
    assert plan.next_deadline_s() is None
    assert plan.scale("context", 1, now_s=2.0) == [Start("context-0", "context")]


def test_a_server_that_ran_before_is_started_again_whatever_it_says() -> None:
    plan = plan_with("context", ready=1)
    plan.exited("context-0", -9, now_s=50.0)
    plan.wake(now_s=50.0)
    plan.exited("context-0", ModelUnavailable.exit_code, now_s=51.0)
    assert plan.instances["context-0"].phase is Phase.WAITING


def test_a_server_too_slow_to_start_is_killed_and_starts_again() -> None:
    plan = LaunchPlan(LIMITS)
    plan.scale("context", 1, now_s=0.0)
    assert plan.wake(now_s=59.0) == []
    assert plan.wake(now_s=60.0) == [Kill("context-0")]
    plan.exited("context-0", -9, now_s=60.1)
    assert plan.wake(now_s=60.1) == [Start("context-0", "context")]


def test_a_hung_server_is_killed_and_starts_again() -> None:
    plan = plan_with(ready=1)
    assert plan.hung("generation-0", "it was silent", now_s=100.0) == [Kill("generation-0")]
    assert plan.events[-1] == (100.0, "generation-0", "killed: it was silent")
    assert plan.exited("generation-0", -9, now_s=100.1) == [Leave("generation", "host:generation-0")]
    assert plan.hung("generation-0", "told late", now_s=100.1) == []
    assert plan.wake(now_s=100.1) == [Start("generation-0", "generation")]
    assert plan.hung("generation-7", "it is long gone", now_s=100.1) == []


def test_scaling_down_drains_the_newest_server_then_stops_it() -> None:
    plan = plan_with(ready=2)
    assert plan.scale("generation", 1, now_s=10.0) == [
        Drain("generation-1", "generation", "host:generation-1", LIMITS.drain_timeout_s)
    ]
    assert not plan.is_settled("generation")
    assert plan.drained("generation-1", num_left=0, now_s=12.0) == [Terminate("generation-1")]
    assert plan.exited("generation-1", 0, now_s=12.5) == [Leave("generation", "host:generation-1")]
    assert plan.is_settled("generation")
    assert phases(plan) == {"generation-0": "ready"}


def test_scaling_down_keeps_the_servers_that_work() -> None:
    plan = plan_with(ready=2)
    plan.exited("generation-0", 1, now_s=50.0)
    assert plan.scale("generation", 1, now_s=50.0) == []
    assert phases(plan) == {"generation-1": "ready"}


def test_scaling_up_while_a_server_drains_takes_a_new_name() -> None:
    plan = plan_with(ready=1)
    plan.scale("generation", 0, now_s=5.0)
    assert plan.scale("generation", 1, now_s=6.0) == [Start("generation-1", "generation")]
    assert phases(plan) == {"generation-0": "draining", "generation-1": "starting"}


def test_a_drain_that_does_not_end_is_cut_short_and_a_deaf_server_is_killed() -> None:
    plan = plan_with(ready=1)
    plan.scale("generation", 0, now_s=5.0)
    assert plan.wake(now_s=25.0) == [Terminate("generation-0")]
    assert plan.drained("generation-0", num_left=3, now_s=25.1) == []
    assert plan.wake(now_s=28.0) == [Kill("generation-0")]
    plan.exited("generation-0", -9, now_s=28.1)
    assert phases(plan) == {}


def test_a_server_let_go_while_it_starts_never_joins() -> None:
    plan = LaunchPlan(LIMITS)
    plan.scale("context", 1, now_s=0.0)
    assert plan.scale("context", 0, now_s=1.0) == [Terminate("context-0")]
    assert plan.ready("context-0", "h:1", now_s=1.1) == []
    assert plan.exited("context-0", 0, now_s=1.2) == []
    assert phases(plan) == {}


def test_a_draining_server_that_crashes_is_not_replaced() -> None:
    plan = plan_with(ready=1)
    plan.scale("generation", 0, now_s=5.0)
    assert plan.exited("generation-0", -9, now_s=6.0) == [Leave("generation", "host:generation-0")]
    assert plan.drained("generation-0", num_left=0, now_s=6.1) == []
    assert phases(plan) == {}


def test_stopping_everything_forgets_what_does_not_run_and_terminates_the_rest() -> None:
    plan = plan_with(ready=2)
    plan.exited("generation-0", 1, now_s=50.0)
    assert plan.stop_all(now_s=50.0) == [Terminate("generation-1")]
    plan.exited("generation-1", 0, now_s=50.1)
    assert phases(plan) == {}
    assert plan.next_deadline_s() is None


@pytest.mark.parametrize("seed", range(100))
def test_whatever_happens_the_right_number_of_servers_comes_back(seed: int) -> None:
    world = World(seed)
    for _ in range(200):
        world.happen()
    world.calm_down()


class World:
    """Processes that start, crash, drain and stop as chance has it, with the plan's decisions carried out."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.plan = LaunchPlan(LIMITS)
        self.now_s = 0.0
        self.running: set[str] = set()
        self.drains: set[str] = set()
        self.joined: set[str] = set()
        self.num_addresses = 0

    def happen(self) -> None:
        chance = self.random.random()
        names = sorted(self.running)
        if chance < 0.1:
            self.carry_out(self.plan.scale("context", self.random.randrange(4), now_s=self.now_s))
        elif chance < 0.4 and names:
            self.make_ready(self.random.choice(names))
        elif chance < 0.6 and names:
            self.end(self.random.choice(names), self.random.choice([0, 1, 4, -9, -15]))
        elif chance < 0.63 and names:
            self.carry_out(self.plan.hung(self.random.choice(names), "silent", now_s=self.now_s))
        elif chance < 0.7 and self.drains:
            name = self.random.choice(sorted(self.drains))
            self.drains.remove(name)
            self.carry_out(self.plan.drained(name, num_left=0, now_s=self.now_s))
        else:
            self.now_s += self.random.choice([0.1, 1.0, 30.0])
            self.carry_out(self.plan.wake(now_s=self.now_s))
        self.plan.check_integrity()
        assert len(self.joined) <= len(self.running)

    def make_ready(self, name: str) -> None:
        if self.plan.instances[name].phase in (Phase.STARTING, Phase.STOPPING):
            self.num_addresses += 1
            self.carry_out(self.plan.ready(name, f"h:{self.num_addresses}", now_s=self.now_s))

    def end(self, name: str, code: int) -> None:
        self.running.remove(name)
        self.carry_out(self.plan.exited(name, code, now_s=self.now_s))

    def carry_out(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            match decision:
                case Start(name):
                    assert name not in self.running, f"{name} runs twice"
                    self.running.add(name)
                case Join(_, address):
                    self.joined.add(address)
                case Leave(_, address):
                    self.joined.remove(address)
                case Drain(name):
                    self.drains.add(name)
                case Terminate(name):
                    assert name in self.running
                case Kill(name):
                    self.end(name, -9)

    def calm_down(self) -> None:
        """No more accidents: every server starts, drains and stops as it is told."""
        self.carry_out(self.plan.scale("context", 2, now_s=self.now_s))
        for _ in range(100):
            for name in sorted(self.running):
                if name in self.running:
                    self.make_ready(name)
                if name in self.running and self.plan.instances[name].phase is Phase.STOPPING:
                    self.end(name, 0)
            self.now_s = self.plan.next_deadline_s() or self.now_s
            self.carry_out(self.plan.wake(now_s=self.now_s))
        assert self.plan.is_settled("context")
        assert len(self.running) == len(self.joined) == 2
