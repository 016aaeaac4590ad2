"""From training checkpoints to the released layout."""

from .distributed_checkpoint import DistributedCheckpoint, StoredTensor
from .pickled_metadata import UnsafePickleError, read_metadata

__all__ = [
    "DistributedCheckpoint",
    "StoredTensor",
    "UnsafePickleError",
    "read_metadata",
]
