"""What a worker is told by its supervisor when it starts: on its standard input, as nobody else can read there."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import BinaryIO, Final

from disaggregated.config.deployment import DeploymentConfig

SUPERVISOR_SOCKET: Final = "supervisor"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    index: int
    config: DeploymentConfig
    """Its port is the one that all of them listen on."""
    folder: Path
    """Of the private sockets."""
    levels_fd: int
    """Memory with the quotas' levels, which it inherits."""

    def socket_of(self, index: int) -> Path:
        return self.folder / f"worker-{index}"

    @property
    def siblings(self) -> list[Path]:
        """The private sockets of the others."""
        return [self.socket_of(each) for each in range(self.config.door.num_workers) if each != self.index]

    def to_bytes(self) -> bytes:
        return pickle.dumps(self)

    @staticmethod
    def read(file: BinaryIO) -> Orders:
        """From the process that started us: whoever can write there can do anything to us anyway."""
        orders = pickle.loads(file.read())
        assert isinstance(orders, Orders), f"orders of another kind: {type(orders)}"
        return orders
