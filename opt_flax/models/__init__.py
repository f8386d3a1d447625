"""The public OPT classes."""
