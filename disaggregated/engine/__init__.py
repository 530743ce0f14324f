"""The engine that both server roles run. Torch lives in this package and nowhere else."""
