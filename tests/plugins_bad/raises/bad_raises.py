"""Raises while it is imported."""

raise RuntimeError("this plugin was built for another machine")
