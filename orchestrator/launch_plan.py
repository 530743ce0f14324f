"""What should run on this machine, and what to do next about the difference: events in, decisions out, no I/O.

                    ready                 scaled down               drained, or too late
    STARTING ─────────────▶ READY ─────────────────▶ DRAINING ────────────────────▶ STOPPING ──▶ gone
       ▲    │ exited          │ exited                   │ exited                        │ exited
       │    ▼                 │                          └──────────▶ gone               ▼
       │  WAITING ◀───────────┘                                                        gone
       └────┘  after a backoff          STARTING that cannot succeed (exit code says so) ──▶ FAILED

Invariant: a name belongs to one instance at a time, and an instance has at most one process. `launcher.py` is the thin
loop around this class: it starts processes, watches them and reports what it sees.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
from collections.abc import Iterator, Mapping
from typing import Final

from disaggregated.errors import ConfigError, ModelUnavailable, NotEnoughMemory

HOPELESS: Final = frozenset(error.exit_code for error in (ConfigError, ModelUnavailable, NotEnoughMemory))
"""Exit codes with which a server says that starting it again cannot help. Believed at its first start only: one that
has run before may have found the machine in a bad moment."""


class Phase(enum.StrEnum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPING = "stopping"
    WAITING = "waiting"
    FAILED = "failed"


_LIVE: Final = frozenset({Phase.STARTING, Phase.READY, Phase.WAITING, Phase.FAILED})
"""Phases of an instance that counts towards the number wanted."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LaunchLimits:
    start_timeout_s: float = 180.0
    drain_timeout_s: float = 180.0
    """For the requests that a server being removed still has; then it is stopped all the same."""
    stop_timeout_s: float = 3.0
    """From SIGTERM to SIGKILL."""
    backoff_first_s: float = 1.0
    """Before the second restart in a row; the first one is immediate. Doubles each time."""
    backoff_max_s: float = 30.0
    hung_timeout_s: float = 60.0
    """A server that was ready and then says nothing for so long is killed, and starts again; 0: never."""
    stable_s: float = 10.0
    """Ready for so long: the next crash counts as the first one again."""


@dataclasses.dataclass(slots=True, kw_only=True)
class Instance:
    name: str
    role: str
    phase: Phase
    since_s: float
    """When the phase began."""
    deadline_s: float | None
    """When to act unless an event comes first."""
    address: str = ""
    restarts: int = 0
    failures_in_a_row: int = 0
    last_exit: str = ""
    """How the last process ended: "exit code 1", "signal 9"."""


@dataclasses.dataclass(frozen=True, slots=True)
class Start:
    name: str
    role: str


@dataclasses.dataclass(frozen=True, slots=True)
class Join:
    """The server takes requests from now on."""

    role: str
    address: str


@dataclasses.dataclass(frozen=True, slots=True)
class Leave:
    """The server is gone, or as good as gone."""

    role: str
    address: str


@dataclasses.dataclass(frozen=True, slots=True)
class Drain:
    """Give it nothing new, and report `drained` when the last request is gone or the deadline has passed."""

    name: str
    role: str
    address: str
    timeout_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class Terminate:
    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class Kill:
    name: str


Decision = Start | Join | Leave | Drain | Terminate | Kill


class LaunchPlan:
    """Desired and actual servers of a deployment. Time comes in as an argument, in seconds of any monotonic clock."""

    def __init__(self, limits: LaunchLimits) -> None:
        self.limits = limits
        self.events: collections.deque[tuple[float, str, str]] = collections.deque(maxlen=200)
        """(when, instance, what happened): what an operator asks first. The oldest go when it is full."""
        self._wanted: dict[str, int] = {}
        self._instances: dict[str, Instance] = {}

    @property
    def instances(self) -> Mapping[str, Instance]:
        return self._instances

    def wanted(self, role: str) -> int:
        return self._wanted.get(role, 0)

    def next_deadline_s(self) -> float | None:
        """When `wake` is due, whatever happens."""
        deadlines = [i.deadline_s for i in self._instances.values() if i.deadline_s is not None]
        return min(deadlines, default=None)

    def is_settled(self, role: str) -> bool:
        """As many servers are ready as are wanted, and none is on its way in or out."""
        phases = [instance.phase for instance in self._of(role)]
        return phases == [Phase.READY] * self.wanted(role)

    def scale(self, role: str, count: int, *, now_s: float) -> list[Decision]:
        """From now on `count` servers of the role are wanted. Also gives instances that had failed another chance."""
        assert count >= 0, f"{count} servers wanted"
        self._wanted[role] = count
        for instance in list(self._of(role)):
            if instance.phase is Phase.FAILED:
                del self._instances[instance.name]
        live = sorted((i for i in self._of(role) if i.phase in _LIVE), key=_least_useful_last)
        decisions: list[Decision] = []
        for instance in live[count:]:
            decisions += self._let_go(instance, now_s)
        for _ in range(count - len(live)):
            decisions += self._start_new(role, now_s)
        return decisions

    def stop_all(self, *, now_s: float) -> list[Decision]:
        """Ends every server without draining it: the requests are gone already."""
        self._wanted = dict.fromkeys(self._wanted, 0)
        decisions: list[Decision] = []
        for instance in list(self._instances.values()):
            if instance.phase in (Phase.WAITING, Phase.FAILED):
                del self._instances[instance.name]
            elif instance.phase is not Phase.STOPPING:
                decisions += self._stop(instance, now_s)
        return decisions

    def ready(self, name: str, address: str, *, now_s: float) -> list[Decision]:
        instance = self._instances[name]
        if instance.phase is not Phase.STARTING:  # It was let go while it started.
            return []
        instance.address = address
        self._enter(instance, Phase.READY, now_s, f"ready at {address}")
        return [Join(instance.role, address)]

    def drained(self, name: str, *, num_left: int, now_s: float) -> list[Decision]:
        instance = self._instances.get(name)
        if instance is None or instance.phase is not Phase.DRAINING:
            return []
        self._note(now_s, name, "drained" if num_left == 0 else f"drained, {num_left} requests left")
        return self._stop(instance, now_s)

    def hung(self, name: str, reason: str, *, now_s: float) -> list[Decision]:
        """Its exit is the next event. One that is on its way out has a deadline already."""
        instance = self._instances.get(name)
        if instance is None or instance.phase is not Phase.READY:
            return []
        self._note(now_s, name, f"killed: {reason}")
        return [Kill(name)]

    def exited(self, name: str, code: int, *, now_s: float) -> list[Decision]:
        """The instance's process is gone; `code` is negative for a signal, as `subprocess` has it."""
        instance = self._instances[name]
        instance.last_exit = f"signal {-code}" if code < 0 else f"exit code {code}"
        decisions: list[Decision] = []
        if instance.address:
            decisions.append(Leave(instance.role, instance.address))
            instance.address = ""
        if instance.phase in (Phase.DRAINING, Phase.STOPPING):
            del self._instances[name]
            self._note(now_s, name, f"stopped with {instance.last_exit}")
        elif instance.phase is Phase.STARTING and code in HOPELESS and instance.restarts == 0:
            self._enter(instance, Phase.FAILED, now_s, f"cannot start: {instance.last_exit}")
        else:
            self._wait_for_restart(instance, now_s)
        return decisions

    def wake(self, *, now_s: float) -> list[Decision]:
        """What the deadlines that have passed ask for."""
        decisions: list[Decision] = []
        for instance in list(self._instances.values()):
            if instance.deadline_s is not None and instance.deadline_s <= now_s:
                decisions += self._overdue(instance, now_s)
        return decisions

    def check_integrity(self) -> None:
        for name, instance in self._instances.items():
            assert name == instance.name, f"{name} is filed as {instance.name}"
            timed = instance.phase not in (Phase.READY, Phase.FAILED)
            assert timed == (instance.deadline_s is not None), f"{name} is {instance.phase} and could wait for ever"
            assert bool(instance.address) or instance.phase is not Phase.READY, f"{name} is ready at no address"
        for role, count in self._wanted.items():
            live = sum(instance.phase in _LIVE for instance in self._of(role))
            assert live == count, f"{live} {role} servers for {count} wanted"

    def _of(self, role: str) -> Iterator[Instance]:
        return (instance for instance in self._instances.values() if instance.role == role)

    def _start_new(self, role: str, now_s: float) -> list[Decision]:
        number = next(n for n in range(len(self._instances) + 1) if f"{role}-{n}" not in self._instances)
        name = f"{role}-{number}"
        deadline_s = now_s + self.limits.start_timeout_s
        instance = Instance(name=name, role=role, phase=Phase.STARTING, since_s=now_s, deadline_s=deadline_s)
        self._instances[name] = instance
        self._note(now_s, name, "started")
        return [Start(name, role)]

    def _let_go(self, instance: Instance, now_s: float) -> list[Decision]:
        if instance.phase is Phase.WAITING:
            del self._instances[instance.name]
            self._note(now_s, instance.name, "no longer wanted")
            return []
        if instance.phase is Phase.STARTING:
            return self._stop(instance, now_s)
        self._enter(instance, Phase.DRAINING, now_s, "draining", timeout_s=self.limits.drain_timeout_s)
        return [Drain(instance.name, instance.role, instance.address, self.limits.drain_timeout_s)]

    def _stop(self, instance: Instance, now_s: float) -> list[Decision]:
        self._enter(instance, Phase.STOPPING, now_s, "told to stop", timeout_s=self.limits.stop_timeout_s)
        return [Terminate(instance.name)]

    def _wait_for_restart(self, instance: Instance, now_s: float) -> None:
        was_stable = instance.phase is Phase.READY and now_s - instance.since_s >= self.limits.stable_s
        instance.failures_in_a_row = 1 if was_stable else instance.failures_in_a_row + 1
        backoff_s = self._backoff_s(instance.failures_in_a_row)
        text = f"crashed with {instance.last_exit}; starts again in {backoff_s:g} s"
        self._enter(instance, Phase.WAITING, now_s, text, timeout_s=backoff_s)

    def _backoff_s(self, failures_in_a_row: int) -> float:
        if failures_in_a_row <= 1:
            return 0.0
        doublings = min(failures_in_a_row - 2, 16)
        return min(self.limits.backoff_first_s * 2.0**doublings, self.limits.backoff_max_s)

    def _overdue(self, instance: Instance, now_s: float) -> list[Decision]:
        if instance.phase is Phase.WAITING:
            instance.restarts += 1
            self._enter(instance, Phase.STARTING, now_s, "started again", timeout_s=self.limits.start_timeout_s)
            return [Start(instance.name, instance.role)]
        if instance.phase is Phase.DRAINING:
            self._note(now_s, instance.name, "not drained in time")
            return self._stop(instance, now_s)
        # A kill cannot be refused, so that its exit is the next event; asking again does no harm.
        doing = "stop" if instance.phase is Phase.STOPPING else "start"
        self._note(now_s, instance.name, f"killed: too slow to {doing}")
        instance.deadline_s = now_s + self.limits.stop_timeout_s
        return [Kill(instance.name)]

    def _enter(
        self, instance: Instance, phase: Phase, now_s: float, text: str, *, timeout_s: float | None = None
    ) -> None:
        instance.phase = phase
        instance.since_s = now_s
        instance.deadline_s = None if timeout_s is None else now_s + timeout_s
        self._note(now_s, instance.name, text)

    def _note(self, now_s: float, name: str, text: str) -> None:
        self.events.append((now_s, name, text))


def _least_useful_last(instance: Instance) -> tuple[int, int]:
    """Servers that work are kept before those that might, and the longest-numbered name goes first."""
    order = (Phase.READY, Phase.STARTING, Phase.WAITING, Phase.FAILED)
    return order.index(instance.phase), int(instance.name.rpartition("-")[2])
