"""Export, filter, describe and publish a run's dataset."""
