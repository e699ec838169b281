"""The demo: the whole job on two small real models that come from the package index."""
