"""Eight virtual devices, which JAX must know of before it computes anything."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
