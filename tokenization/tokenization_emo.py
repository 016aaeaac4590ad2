"""`EmoTokenizer`: a `tokenizer.json` used exactly as it is, with EMO's special tokens."""

import copy
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..imports.transformers_versions import private_names
from .beginnings import in_groups

with private_names("tokenizer"):
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

# `tokenizer_config.json` names this class, so that tools without this package can read the saved files.
_SAVED_CLASS = "PreTrainedTokenizerFast"
_DEFAULT_TOKENS = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}

_SURROGATES = re.compile("[\ud800-\udfff]")


def _whole(text: str) -> str:
    """The text with whole surrogate pairs joined, and halves replaced by U+FFFD."""
    if not isinstance(text, str) or not _SURROGATES.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


class EmoTokenizer(TokenizersBackend):
    """Byte-level BPE tokenizer of EMO: EOS is `<|endoftext|>`, padding is `<|pad|>`, and there is no BOS.

    The ids are always those of the repository's `tokenizer.json`, whatever `tokenizer_class` it names.
    Transformers' classes for other models rebuild a tokenizer from vocabulary and merges, and then split text
    as that other model does.

    `tokenizer(text)` appends nothing. To end texts with EOS there are `encode_documents`, for training, and
    `add_eos_token=True`, as for every Transformers tokenizer.

    Args:
        tokenizer_file (`str`, *optional*): a `tokenizer.json`.
        tokenizer_object (`tokenizers.Tokenizer`, *optional*): a tokenizer, instead of the file.
        kwargs: as for every Transformers tokenizer. `eos_token` and `pad_token` are by default
            `<|endoftext|>` and `<|pad|>` if the vocabulary has them. Otherwise there are none: the id of a
            new token would be outside the model's embedding.

    Raises:
        ValueError: if there is neither a file nor a tokenizer.

    Example:

    ```python
    >>> from transformers_emo import EmoTokenizer
    >>> tokenizer = EmoTokenizer.from_pretrained("model_cards/toy-emo")
    >>> ids = tokenizer("Experts group by topic.")["input_ids"]
    >>> tokenizer.decode(ids), tokenizer.eos_token_id in ids
    ('Experts group by topic.', False)

    ```
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]
    _tokenizer: Any = None

    def __init__(
        self, tokenizer_file: str | None = None, tokenizer_object: Tokenizer | None = None, **kwargs
    ):
        if tokenizer_object is None and tokenizer_file is None:
            raise ValueError(
                f"There is no `tokenizer.json` in {kwargs.get('name_or_path') or 'the arguments'}, and "
                "`EmoTokenizer` reads no other format: put one there with `tokenizer.save_pretrained`."
            )
        # Transformers would load it later, but the defaults depend on the vocabulary.
        if tokenizer_object is None:
            backend = Tokenizer.from_file(str(tokenizer_file))
        else:
            backend = copy.deepcopy(tokenizer_object)
        for name, token in _DEFAULT_TOKENS.items():
            if name not in kwargs and backend.token_to_id(token) is not None:
                kwargs[name] = token
        self._tokenizer = backend
        super().__init__(**kwargs)

    @classmethod
    def convert_to_native_format(cls, trust_remote_code=False, **kwargs):
        """The settings as they are: `tokenizer.json` needs no conversion."""
        return kwargs

    def encode_documents(self, texts: Iterable[str]) -> list[list[int]]:
        """Encode whole documents for training: the ids of each, with EOS after the last one and nowhere else.

        The text of a special token inside a document is text: a page that quotes `<|endoftext|>` stays whole.
        Half a surrogate pair, which JSON can hold and UTF-8 cannot, becomes U+FFFD, as in tiktoken.

        Args:
            texts (`Iterable[str]`): the documents; a string is one document.

        Returns:
            `list[list[int]]`: ids of each document, of any length.

        Raises:
            ValueError: if the tokenizer has no EOS token.

        Example:

        ```python
        >>> from transformers_emo import EmoTokenizer
        >>> tokenizer = EmoTokenizer.from_pretrained("model_cards/toy-emo")
        >>> [tokenizer.decode(ids) for ids in tokenizer.encode_documents(["One.", "Two."])]
        ['One.<eos>', 'Two.<eos>']

        ```
        """
        if self.eos_token_id is None:
            raise ValueError(
                "The tokenizer has no EOS token to end documents with: set `tokenizer.eos_token`."
            )
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            return []
        settings = {"add_special_tokens": False, "split_special_tokens": True, "truncation": False}
        settings |= {"padding": False, "return_attention_mask": False, "verbose": False}
        encoded: list[list[int]] = []
        for group in in_groups(map(_whole, texts), lambda text: len(text) if isinstance(text, str) else 0):
            encoded += (ids + [self.eos_token_id] for ids in self(group, **settings)["input_ids"])
        return encoded

    def _save_pretrained(
        self, save_directory, file_names, legacy_format=None, filename_prefix=None
    ) -> tuple[str, ...]:
        config_file = Path(file_names[0])
        config = json.loads(config_file.read_text(encoding="utf-8")) | {"tokenizer_class": _SAVED_CLASS}
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        config_file.write_text(text, encoding="utf-8")
        return super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
