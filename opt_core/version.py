"""The version of the distribution, alone so that packaging can read it without importing more."""

__version__ = "0.1.0"
