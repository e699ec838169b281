"""A run from its file to its end: read, checked, started, moved from stage to stage."""
