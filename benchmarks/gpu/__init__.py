"""Checks and figures of the CUDA path, all with `make gpu`; on a machine without a GPU it says so and ends."""
