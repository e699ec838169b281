"""The worker processes: the runner that works jobs, and the cluster around it."""
