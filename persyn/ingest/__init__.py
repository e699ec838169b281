"""Prompts and responses from files into the store."""
