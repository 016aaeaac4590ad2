from .engines.export import export_model
from .engines.from_qwen2_moe import convert_qwen2_moe
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
    "convert_qwen2_moe",
    "convert_to_olmo_core",
    "export_model",
    "read_metadata",
    "shard_experts",
    "upgrade_checkpoint",
]
