"""Octavo's inference engine. Importing this package loads no torch."""

__version__ = "0.1.0"
