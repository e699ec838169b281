"""What the store says of runs, read and never written: summaries, comparisons, provenance, estimates."""
