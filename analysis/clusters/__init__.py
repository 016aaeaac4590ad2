"""Tokens grouped by their routing: topics, or kinds of words?"""

from .token_clusters import TokenClusters, cluster_tokens

__all__ = ["TokenClusters", "cluster_tokens"]
