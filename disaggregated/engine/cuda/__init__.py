"""What only a CUDA device needs: Triton kernels, graphs of decode steps, sampling and staging without a host wait.

Importing this package touches neither CUDA nor Triton; `ops.load()` does both.
"""
