"""The demo: a complete run with two small real models from the package index."""
