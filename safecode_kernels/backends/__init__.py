"""Implementations of the decode step; see registry.py for which one serves."""
