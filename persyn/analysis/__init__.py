"""Read models of runs: summaries, comparisons, provenance and estimates; nothing here writes to the store."""
