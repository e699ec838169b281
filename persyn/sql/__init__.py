"""Questions to the store in SQL: asked where they can do no harm, and those that ship with PerSyn."""
