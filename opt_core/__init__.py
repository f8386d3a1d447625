"""What OPT is, for every framework: configuration, weights, files, text, decoding, reference."""

from opt_core.version import __version__

__all__ = ["__version__"]
