"""The `persyn` command line."""
