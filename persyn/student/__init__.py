"""Train students on a run's dataset, evaluate them and compare the results."""
