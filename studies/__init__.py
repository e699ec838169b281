"""Studies of the method on real data, each a command with a report of its results."""
