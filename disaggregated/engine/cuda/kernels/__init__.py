"""Triton kernels. These modules import Triton, so nothing outside imports them before a CUDA op table is wanted.

Every kernel computes a row (a token, a head, a sequence) in a program whose shape the model alone decides. Numbers that
a batch decides, such as its size, are never specialised on: Triton may lay a tensor out differently for another
divisibility, and then adds it up in another order. Fused multiply-adds are off (`EXACT`), so that an expression has the
same bits in whichever kernel it stands.

With `TRITON_INTERPRET=1` in the environment they run on the CPU, which is how they are tested without a device.
"""

from typing import Any, Final

EXACT: Final[dict[str, Any]] = {"enable_fp_fusion": False}
"""Launch options of every kernel whose results another kernel must reproduce."""
