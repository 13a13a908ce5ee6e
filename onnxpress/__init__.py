"""The commands and the recipe runner."""

__version__ = "0.1.0"
