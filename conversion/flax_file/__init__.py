"""Files of Flax models: `flax_model.msgpack` and Orbax's folders, without JAX, Flax or Orbax."""

from conversion.flax_file.msgpack_file import is_msgpack, read_msgpack
from conversion.flax_file.msgpack_writing import write_msgpack
from conversion.flax_file.orbax_folder import is_orbax, read_orbax
from conversion.flax_file.orbax_writing import write_orbax
from conversion.flax_file.params import OURS, TRANSFORMERS

__all__ = [
    "OURS",
    "TRANSFORMERS",
    "is_msgpack",
    "is_orbax",
    "read_msgpack",
    "read_orbax",
    "write_msgpack",
    "write_orbax",
]
