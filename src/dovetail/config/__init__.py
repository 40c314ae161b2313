"""Frozen configuration values. Imports no torch."""
