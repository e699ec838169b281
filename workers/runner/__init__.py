"""One process that works jobs, with or without a cluster around it."""
