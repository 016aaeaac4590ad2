from .expert_shards import shard_experts
from .from_olmo_core import convert_olmo_core
from .olmo_core.distributed_checkpoint import DistributedCheckpoint, StoredTensor
from .olmo_core.pickled_metadata import UnsafePickleError, read_metadata
from .to_olmo_core import convert_to_olmo_core
from .upgrade import upgrade_checkpoint

__all__ = [
    "DistributedCheckpoint",
    "StoredTensor",
    "UnsafePickleError",
    "convert_olmo_core",
    "convert_to_olmo_core",
    "read_metadata",
    "shard_experts",
    "upgrade_checkpoint",
]
