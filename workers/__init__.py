"""The processes that work jobs."""
