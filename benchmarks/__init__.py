"""What PerSyn costs by itself, measured: `python -m benchmarks.store`, `.overhead`, `.engine`."""
