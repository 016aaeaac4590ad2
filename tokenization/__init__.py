"""The EMO tokenizer, and packing documents into windows."""

from .packing import PackedStream, pack_dataset, pack_documents
from .tokenization_emo import EmoTokenizer

__all__ = ["EmoTokenizer", "PackedStream", "pack_dataset", "pack_documents"]
