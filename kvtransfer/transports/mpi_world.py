"""This process in its MPI world: which one it is, how it joins, and who it is there.

A world is what one `mpirun` has launched. MPI begins in all of its processes or in none: MPI_Init returns when every
one of them has called it. So nobody waits for that where another process waits for him: joining begins in the
background, on the thread that will make all MPI calls, as soon as an endpoint or a transport is made; who needs the
world waits for it, within a deadline, when blocks are to travel. It is left when the process ends.
"""

from __future__ import annotations

import atexit
import ctypes
import dataclasses
import functools
import hashlib
import importlib.util
import os
import struct
import threading
import time
from collections.abc import Mapping
from typing import ClassVar, Final, Self

from disaggregated import logs
from disaggregated.errors import TransferError
from disaggregated.parent_death import PARENT_PID
from kvtransfer.deadline import Deadline
from kvtransfer.transports import mpirun
from kvtransfer.transports.mpi_thread import Communicator, MpiThread

log = logs.get(__name__)

JOIN_TIMEOUT_S: Final = 10.0
"""How long one read waits for a world that is not complete: several times what MPI_Init takes on a busy machine."""
LEAVE_TIMEOUT_S: Final = 2.0
ABANDONED_MAX: Final = 64
"""Messages that MPI has not let go of. With that many nothing new is begun: it, or its world, is not well."""
HOW_TO_LAUNCH: Final = "mpirun -n 1 disaggregated serve context … : -n 1 disaggregated serve generation …"
_LAUNCHED: Final = ("PMIX_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK")
"""Set by the launchers of MPI processes (Open MPI's and Slurm's PMIx, MPICH's PMI), and by nothing else."""
_NAMES: Final = ("PMIX_NAMESPACE", "PMI_JOBID", "SLURM_JOB_ID")
_FUNNELED: Final = 1
"""MPI_THREAD_FUNNELED in Open MPI's ABI and in MPICH's: the thread that begins MPI makes all calls."""
_SETTINGS: Final = {"OMPI_MCA_async_mpi_init": "1", "OMPI_MCA_async_mpi_finalize": "1"}
"""Of Open MPI, where the operator has set nothing else: no barrier at either end, so that servers come and go alone."""
_TOLERATES_DEATH: Final = "OMPI_MCA_mpi_ft_enable"
"""Set by `mpirun --with-ft ulfm`. Leaving such a world in order would wait for everybody else to leave."""


def missing(environment: Mapping[str, str] = os.environ) -> str | None:
    """What this process lacks to be part of an MPI world, as the rest of a sentence. Loads nothing."""
    if importlib.util.find_spec("mpi4py") is None:
        return f"needs the mpi4py package and an MPI: {mpirun.TO_INSTALL}"
    if PARENT_PID in environment or not any(name in environment for name in _LAUNCHED):  # The first: not by mpirun.
        return f"needs both servers in one MPI world: {HOW_TO_LAUNCH}"
    return None


@dataclasses.dataclass(frozen=True, slots=True)
class MpiAddress:
    """Where a process is: the same rank of another world is somebody else."""

    world: bytes
    rank: int

    _WIRE: ClassVar = struct.Struct("<16sI")

    def pack(self) -> bytes:
        return self._WIRE.pack(self.world, self.rank)

    @classmethod
    def unpack(cls, packed: bytes) -> Self:
        """Raises TransferError."""
        if len(packed) != cls._WIRE.size:
            raise TransferError(f"an MPI address of {len(packed)} bytes where {cls._WIRE.size} belong")
        return cls(*cls._WIRE.unpack(packed))


class MpiWorld:
    """Joined once a process: MPI cannot be begun twice. Thread-safe."""

    def __init__(self) -> None:
        self.thread = MpiThread()
        self._joining = threading.Lock()
        self._settled = threading.Event()
        self._failure: str | None = None
        self._runner: threading.Thread | None = None
        self._begun_s = 0.0
        self._next_tag = int.from_bytes(os.urandom(2), "little")
        self._tag_max = 32767
        """What every MPI allows at least."""
        self.ours = MpiAddress(b"", 0)
        self.size = 0

    def begin(self) -> None:
        """Joins in the background. Idempotent, and never waits."""
        with self._joining:
            if self._runner is None:
                self._begun_s = time.monotonic()
                self._runner = threading.Thread(target=self._run, name="mpi", daemon=True)
                self._runner.start()

    def join(self, *, deadline: Deadline) -> None:
        """Returns when every process of the world is there. Raises TransferError when that fails, or takes too long."""
        self.begin()
        if not self._settled.wait(deadline.no_later_than(JOIN_TIMEOUT_S).left_s()):
            raise TransferError(
                f"MPI has not begun after {time.monotonic() - self._begun_s:.0f} s: each process of this mpirun must "
                "run, and have cache_transceiver_config.backend: MPI"
            )
        self.check()

    def check(self) -> None:
        """Raises TransferError when this world is known to be of no use."""
        if self._failure:
            raise TransferError(f"MPI could not be begun: {self._failure}")
        if self.thread.num_abandoned >= ABANDONED_MAX:
            raise TransferError(f"MPI does not let go of {self.thread.num_abandoned} messages of broken reads")

    def fresh_tag(self) -> int:
        """For one connection, so that a message of a broken one is not taken for a later one's."""
        with self._joining:
            self._next_tag = (self._next_tag + 1) % self._tag_max
            return self._next_tag

    def check_tag(self, tag: int) -> int:
        """A tag that a peer told, which MPI can use. Raises TransferError."""
        if not 0 <= tag <= self._tag_max:
            raise TransferError(f"MPI tag {tag} of at most {self._tag_max}")
        return tag

    def rank_of(self, packed: bytes) -> int:
        """The rank at an address that a peer told. Raises TransferError when it is not of this world."""
        theirs = MpiAddress.unpack(packed)
        if theirs.world != self.ours.world or theirs.rank >= self.size:
            raise TransferError(f"the peer is in another MPI world; both must come from one launch: {HOW_TO_LAUNCH}")
        return theirs.rank

    def _run(self) -> None:
        """The MPI thread, to the end of the process."""
        try:
            world = self._begin()
        except (ImportError, RuntimeError) as error:  # The latter where mpi4py finds no MPI, and for MPI's own errors.
            self._failure = str(error)
            self._settled.set()
            return
        self._settled.set()
        self.thread.run(world)
        self._finalise()

    def _begin(self) -> Communicator:
        """Returns when every process of the world has called it."""
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        import mpi4py

        mpi4py.rc.initialize = False
        mpi4py.rc.finalize = False
        _call_library("MPI_Init_thread", None, None, _FUNNELED, ctypes.byref(ctypes.c_int()))
        from mpi4py import MPI

        world = MPI.COMM_WORLD
        world.Set_errhandler(MPI.ERRORS_RETURN)
        self.size = world.size
        self.ours = MpiAddress(_world_key(world.size), world.rank)
        self._tag_max = int(world.Get_attr(MPI.TAG_UB) or self._tag_max)
        atexit.register(self._leave)
        log.info("mpi_begun", library=MPI.Get_library_version().split(",")[0], rank=world.rank, size=world.size)
        return world

    def _finalise(self) -> None:
        if os.environ.get(_TOLERATES_DEATH, "0") in {"", "0"}:
            _call_library("MPI_Finalize")

    def _leave(self) -> None:
        """Launchers take a process that ends without MPI_Finalize for one that crashed."""
        assert self._runner is not None, "a world that was left before it was joined"
        self.thread.end()
        self._runner.join(LEAVE_TIMEOUT_S)


def _call_library(name: str, *arguments: object) -> None:
    """A call of MPI that waits for other processes. mpi4py makes it with the interpreter lock held, and so would stop
    every thread of this process meanwhile, its event loop first; ctypes lets go of the lock.

    Raises RuntimeError, or ImportError when there is no MPI.
    """
    found = importlib.util.find_spec("mpi4py.MPI")
    if found is None or found.origin is None:
        raise ImportError("mpi4py is here without the part that knows an MPI")
    try:
        call = getattr(ctypes.CDLL(found.origin), name)
    except (OSError, AttributeError) as error:
        raise ImportError(f"mpi4py finds no MPI: {error}") from error
    if code := call(*arguments):
        raise RuntimeError(f"{name} returned {code}")


def _world_key(size: int) -> bytes:
    """Equal for the processes of one launch. What it cannot tell apart, the first message over a connection does."""
    names = "/".join(os.environ.get(name, "") for name in _NAMES)
    return hashlib.sha256(f"{names}/{size}".encode()).digest()[:16]


@functools.cache
def our_world() -> MpiWorld:
    return MpiWorld()
