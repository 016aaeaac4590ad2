"""The tokenizer of a model as llama.cpp has it: tokens, merges, and the name of a known way to cut text.

llama.cpp does not read the pattern that cuts text into words. It has a list of patterns by name. A tokenizer
whose pattern is on it gives the same ids there; any other is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...checkpoints import CheckpointError
from ...checkpoints.small_files import read_json, read_small

if TYPE_CHECKING:
    from gguf import GGUFWriter

_CONTRACTIONS = ("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "'(?i:[sdmt]|ll|ve|re)")
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_POSSESSIVE = r"|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_PATTERNS = {before + _WORDS: "dbrx" for before in _CONTRACTIONS}
_PATTERNS |= {before + _POSSESSIVE: "dbrx" for before in _CONTRACTIONS}


def add_tokenizer(writer: GGUFWriter, folder: Path, vocab_size: int) -> None:
    """Write a byte-level BPE tokenizer to a GGUF.

    Tokens that the model has rows for and the tokenizer does not know are written as unused.

    Args:
        writer (`GGUFWriter`): the file.
        folder (`Path`): the folder with `tokenizer.json`, and `tokenizer_config.json` if there is one.
        vocab_size (`int`): rows of the model's embeddings.

    Raises:
        CheckpointError: if a file is damaged, or the tokenizer has more tokens than the model.
        ValueError: if llama.cpp would give other ids. The message says why.

    Example:

    ```python
    >>> from gguf import GGUFWriter
    >>> from pathlib import Path
    >>> from transformers_emo.conversion.engines.gguf_tokenizer import add_tokenizer
    >>> writer = GGUFWriter(None, "qwen2moe")
    >>> add_tokenizer(writer, Path("model_cards/emo-tiny"), 4096)
    >>> writer.kv_data[0]["tokenizer.ggml.pre"].value
    'dbrx'

    ```
    """
    from gguf import TokenType

    content = _read(folder / "tokenizer.json")
    model = content.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise CheckpointError(f"{folder / 'tokenizer.json'} has no vocabulary: download it again.")
    pattern = _pre_tokenizer(content)
    tokens = {index: token for token, index in model["vocab"].items()}
    types = dict.fromkeys(tokens, TokenType.NORMAL)
    for added in content.get("added_tokens") or ():
        tokens[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added.get("special") else TokenType.USER_DEFINED
    if tokens and max(tokens) >= vocab_size:
        raise CheckpointError(
            f"The tokenizer has a token {max(tokens)}, and the model {vocab_size} rows of embeddings: they "
            "do not belong together."
        )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or ()]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pattern)
    writer.add_token_list([tokens.get(index, f"[PAD{index}]") for index in range(vocab_size)])
    writer.add_token_types([types.get(index, TokenType.UNUSED) for index in range(vocab_size)])
    writer.add_token_merges(merges)
    writer.add_add_bos_token(_begins_with_bos(content))
    template = _chat_template(folder)
    if template is not None:
        writer.add_chat_template(template)


def _pre_tokenizer(content: dict[str, Any]) -> str:
    """llama.cpp's name for how the text is cut; `ValueError` if it has none."""
    name: str | None = None
    reasons = []
    if content.get("normalizer") not in (None, {"type": "Sequence", "normalizers": []}):
        reasons.append(f"it normalises text ({content['normalizer'].get('type')})")
    model = content["model"]
    if model.get("type") != "BPE":
        reasons.append(f"it is of type {model.get('type')!r}, expected 'BPE'")
    for setting in ("byte_fallback", "fuse_unk"):
        if model.get(setting):
            reasons.append(f"it has `{setting}`")
    before = content.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers") or [before]
    byte_level = steps[-1] if steps[-1].get("type") == "ByteLevel" else {}
    if byte_level and not byte_level.get("add_prefix_space") and len(steps) == 1:
        name = "gpt-2" if byte_level.get("use_regex", True) else None
    elif byte_level and len(steps) == 2 and steps[0].get("type") == "Split":
        is_plain = steps[0].get("behavior") == "Isolated" and not steps[0].get("invert")
        pattern = (steps[0].get("pattern") or {}).get("Regex")
        if is_plain and not byte_level.get("add_prefix_space") and not byte_level.get("use_regex", True):
            name = _PATTERNS.get(str(pattern))
    if model.get("ignore_merges"):  # the same pattern; words that are tokens are taken whole
        name = "llama-bpe" if name == "dbrx" else None
    if name is None:
        reasons.append("it cuts text into words by a pattern that is not known to be one of llama.cpp's")
    for added in content.get("added_tokens") or ():
        if added.get("lstrip") or added.get("rstrip") or added.get("single_word"):
            reasons.append(f"its token {added['content']!r} takes spaces beside it along")
            break
    if reasons or name is None:
        raise ValueError(
            f"llama.cpp would not give the ids of this tokenizer: {'; '.join(reasons)}. Export the model to "
            "'qwen2-moe', or without its tokenizer."
        )
    return name


def _begins_with_bos(content: dict[str, Any]) -> bool:
    """Whether the tokenizer puts a token before every text."""
    template = list((content.get("post_processor") or {}).get("single") or [])
    return bool(template) and "SpecialToken" in template[0]


def _chat_template(folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return read_small(path).decode("utf-8")
    settings = folder / "tokenizer_config.json"
    template = _read(settings).get("chat_template") if settings.is_file() else None
    return template if isinstance(template, str) else None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path, 256 << 20)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"Cannot read {path}: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is no JSON object: download it again.")
    return content
