"""Engines that score responses."""
