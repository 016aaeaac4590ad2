"""What a model's experts do: how quality falls as they are removed, and whether domains choose different ones."""

from .documents import Domain, draw, encode_documents, read_domains
from .evaluation import DocumentLosses, document_losses
from .measurements import Journal, Measurement, Retention
from .retention import measure_retention, num_experts_at

__all__ = [
    "DocumentLosses",
    "Domain",
    "Journal",
    "Measurement",
    "Retention",
    "document_losses",
    "draw",
    "encode_documents",
    "measure_retention",
    "num_experts_at",
    "read_domains",
]
