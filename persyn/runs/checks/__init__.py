"""Preflight checks of a run: the host, the servers and the models, before anything is paid for."""
