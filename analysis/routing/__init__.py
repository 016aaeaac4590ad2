"""Which experts the tokens of documents go to: read in one pass, kept as parquet files."""

from .folder import RoutingStatistics
from .sources import Document, documents_of
from .statistics import router_statistics
from .word_classes import WordClasses

__all__ = ["Document", "RoutingStatistics", "WordClasses", "documents_of", "router_statistics"]
