"""The report of a run: its facts, its figures, and the document that contains both."""
