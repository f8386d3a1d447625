"""OPT for JAX users, in Flax Linen."""

try:
    import flax as _flax  # noqa: F401
    import jax as _jax  # noqa: F401
except ImportError as fault:
    raise ImportError(
        "opt_flax needs Flax, which is not installed: pip install 'optlm[flax]'"
    ) from fault
