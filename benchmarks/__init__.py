"""Benchmarks of PerSyn's own costs: `python -m benchmarks.store`, `.overhead`, `.engine` and others."""
