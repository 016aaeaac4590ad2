"""The corpus' own tokenizer: byte-level BPE, every domain with the same share of its training text."""

import shutil
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from .build import domains_of, read_lines

SAMPLE_MB = 1.5  # of each domain
# Where no token crosses: words with a mark or space before them, numbers of up to three digits, punctuation
# with the line ends after it, line ends with the indent before them. As the released EMO splits; C needs a
# tenth fewer tokens than where text is split as GPT-2 does.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(out: Path, vocab_size: int, folder: Path, sample_mb: float = SAMPLE_MB) -> None:
    """Train a tokenizer on a corpus' train split and save it as an `EmoTokenizer`.

    EOS `<|endoftext|>` has id 0 and padding `<|pad|>` id 1; all 256 bytes are in the vocabulary, so that
    every text can be encoded and comes back as it was.

    Args:
        out: a built corpus.
        vocab_size: tokens, special ones included.
        folder: where it is saved, whole, in place of what is there.
        sample_mb: text of each domain it is trained on, in units of 10^6 bytes.

    Raises:
        ValueError: if there is no corpus, or `vocab_size` has no room for the bytes.
    """
    from transformers_emo import EmoTokenizer

    if vocab_size < 258:
        raise ValueError(f"vocab_size is {vocab_size}: 256 bytes and 2 special tokens need at least 258.")
    texts = [text for name in domains_of(out) for text in _sample(out, name, sample_mb)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=24,  # bytes; no token is a ruler or a whole licence
        show_progress=True,
    )
    tokenizer.train_from_iterator(texts, trainer, len(texts))
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    EmoTokenizer(tokenizer_object=tokenizer).save_pretrained(str(partial))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _sample(out: Path, name: str, sample_mb: float):
    """Training documents, which are in the order of their hashes: any first part is a fair sample."""
    size = 0.0
    for row in read_lines(out / "train" / f"{name}.jsonl"):
        size += len(row["text"].encode()) / 1e6
        yield row["text"]
        if size >= sample_mb:
            return


def count_tokens(out: Path, folder: Path, split: str) -> dict[str, tuple[int, int]]:
    """Tokens, with one EOS a document, and bytes of each domain's split."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    counts = {}
    for name in tqdm(domains_of(out), f"tokens of {split}", leave=False, unit="domain"):
        texts = [row["text"] for row in read_lines(out / split / f"{name}.jsonl")]
        tokens = sum(
            len(encoding.ids) + 1 for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        )
        counts[name] = (tokens, sum(len(text.encode()) for text in texts))
    return counts
