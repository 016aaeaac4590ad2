from .checkpoint import Checkpoint
from .errors import CheckpointError
from .lazy_tensor import LazyTensor, wanted_ranges
from .safetensors_header import TensorSpan

__all__ = ["Checkpoint", "CheckpointError", "LazyTensor", "TensorSpan", "wanted_ranges"]
