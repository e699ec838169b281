"""Import prompts and responses from files into the store."""
