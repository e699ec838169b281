"""A run for people who were not there: its facts, its figures, and the document that holds both."""
