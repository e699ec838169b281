"""The `persyn` command."""
