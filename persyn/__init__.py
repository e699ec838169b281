"""PerSyn: route each prompt to the teacher a student learns most from, then generate."""
