"""Work jobs in one process, with or without a cluster."""
