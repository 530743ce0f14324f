"""A KV pool on a GPU, in a process of its own, for others to map: `python -m tests.support.gpu_pool '{"layout": {…}}'`.

It prints how its memory is exported, and the checksums of its blocks, as one line of JSON; it lives until its input
ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from disaggregated.engine.cuda.device_pool import CudaPool, device_pool
from disaggregated.kv_layout import KVLayout
from kvtransfer.device_pool import Exported
from kvtransfer.transports import cuda_runtime

SEED = 7


@dataclasses.dataclass(slots=True)
class RemotePool:
    child: subprocess.Popen[str]
    exported: Exported
    checksums: list[int]
    """Of every block, in all layers."""


def noise(layout: KVLayout) -> torch.Tensor:
    """The same in every process on one kind of GPU: (layers, blocks, bytes)."""
    size = (layout.num_layers, layout.num_blocks, layout.block_bytes)
    generator = torch.Generator("cuda").manual_seed(SEED)
    return torch.empty(size, dtype=torch.uint8, device="cuda").random_(0, 256, generator=generator)


def zeroes(layout: KVLayout) -> CudaPool:
    size = (layout.num_layers, layout.num_blocks, layout.block_bytes)
    return device_pool(torch.zeros(size, dtype=torch.uint8, device="cuda"), layout)


@contextlib.contextmanager
def remote_pool(layout: KVLayout) -> Iterator[RemotePool]:
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.support.gpu_pool", json.dumps({"layout": dataclasses.asdict(layout)})],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    try:
        assert child.stdout is not None
        line = child.stdout.readline()
        assert line, "the other process has ended"
        told = json.loads(line)
        exported = Exported(bytes.fromhex(told["handle"]), told["offset"], told["nbytes"])
        yield RemotePool(child, exported, told["checksums"])
    finally:
        child.kill()
        child.communicate()


def main() -> None:
    layout = KVLayout(**json.loads(sys.argv[1])["layout"])
    before = torch.zeros(1 << 16, dtype=torch.uint8, device="cuda")  # So that a small pool begins within its segment.
    pool = device_pool(noise(layout), layout)
    exported = cuda_runtime.load(pool.device_index).export(pool.address, layout.pool_bytes)
    checksums = pool.checksums(range(layout.num_blocks), range(layout.num_layers))
    told = {"handle": exported.handle.hex(), "offset": exported.offset, "nbytes": exported.nbytes}
    sys.stdout.write(json.dumps({**told, "checksums": checksums}) + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    del before


if __name__ == "__main__":
    main()
