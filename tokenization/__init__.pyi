from .answers import encode_answers
from .dolma2 import build_dolma2_tokenizer
from .packing import PackedStream, pack_dataset, pack_documents
from .tokenization_emo import EmoTokenizer

__all__ = [
    "EmoTokenizer",
    "PackedStream",
    "build_dolma2_tokenizer",
    "encode_answers",
    "pack_dataset",
    "pack_documents",
]
