"""What a model's experts do: how quality falls without them, and whether domains use different ones."""

from .claims import claims, claims_text, cliff
from .documents import Domain, draw, encode_documents, read_domains
from .evaluation import DocumentLosses, document_losses
from .measurements import Journal, Measurement, Retention
from .pictures.plots import plot_domains, plot_overlap, plot_retention, plot_topics
from .pictures.training_curves import plot_training, read_training_log, write_training_csv
from .prompt_pools import PromptMeasurement, prompt_pools
from .report import write_report
from .retention import measure_retention, num_experts_at
from .tables import markdown, write_csv
from .topics import TopicCosine, mean_routing, topic_cosine

__all__ = [
    "DocumentLosses",
    "Domain",
    "Journal",
    "Measurement",
    "PromptMeasurement",
    "Retention",
    "TopicCosine",
    "claims",
    "claims_text",
    "cliff",
    "document_losses",
    "draw",
    "encode_documents",
    "markdown",
    "mean_routing",
    "measure_retention",
    "num_experts_at",
    "plot_domains",
    "plot_overlap",
    "plot_retention",
    "plot_topics",
    "plot_training",
    "prompt_pools",
    "read_domains",
    "read_training_log",
    "topic_cosine",
    "write_csv",
    "write_report",
    "write_training_csv",
]
