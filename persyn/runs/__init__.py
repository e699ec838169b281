"""The run file, and the creation and life cycle of a run."""
