"""Where Triton kernels can run here: on a CUDA device, or on the CPU through Triton's interpreter, or not at all.

Import this module before any kernel: the interpreter is chosen when a kernel is defined. Modules that test kernels skip
where Triton is not installed (it is not among what the project needs) or its interpreter does not work with numpy.
"""

from __future__ import annotations

import os
import warnings

import numpy as np
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # Before Triton is imported: its own functions are chosen then, too.
pytest.importorskip("triton", reason="Triton is not installed; the kernels are tested where it is")
if DEVICE == "cpu":
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            int(np.ones(1))
    except TypeError:
        pytest.skip("Triton's interpreter needs numpy before 2.4", allow_module_level=True)

AS_INTERPRETED = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
"""What numpy says when the interpreter computes as a device does."""

DTYPES = [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32]
"""The interpreter rounds bfloat16 in another way than the hardware does."""
