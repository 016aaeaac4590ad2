"""The command `emo routing`."""

import re
from typing import Annotated, Any, NamedTuple

import typer

from ..shared import OUTPUT, AsJson, CacheDir, Revision, Setting, Token, given, stdout_for_json, tell

TEXTS, RUNNING = "Texts", "How it runs"

Texts = Annotated[
    str,
    typer.Option(
        metavar="DIR|FILE",
        help="Folder with calibration/<domain>.jsonl and test/<domain>.jsonl, or with <domain>.jsonl and a "
        "`split` in each line; or one JSONL file. Or the name of a dataset, with --dataset-split.",
        rich_help_panel=TEXTS,
    ),
]
DatasetSplit = Annotated[
    str | None,
    typer.Option(
        metavar="SPLIT",
        help="Read --texts by `datasets.load_dataset`, this split of it, as a stream.",
        rich_help_panel=TEXTS,
    ),
]
Column = Annotated[str, typer.Option(metavar="NAME", help="Column of texts.", rich_help_panel=TEXTS)]
DomainColumn = Annotated[str, typer.Option(metavar="NAME", help="Column of domains.", rich_help_panel=TEXTS)]
MaxTexts = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Read only the first N documents.",
        show_default="all",
        rich_help_panel=TEXTS,
    ),
]
Window = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=2,
        help="Cut documents to N tokens.",
        show_default="the model's context",
        rich_help_panel=TEXTS,
    ),
]
Languages = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DOMAIN=LANGUAGE...",
        help="Tell parts of speech in these domains, which are in the language en, de or nl.",
        show_default="none",
        rich_help_panel=TEXTS,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(help="Run in it, such as bfloat16.", show_default="as saved", rich_help_panel=RUNNING),
]
Device = Annotated[str, typer.Option(help="Such as cpu or cuda.", rich_help_panel=RUNNING)]


class Share(NamedTuple):
    """Which of how many processes this is."""

    number: int
    of: int


def read_share(text: str) -> Share:
    """Read which of how many processes this is, counted from 1.

    Args:
        text (`str`): the word of the command.

    Raises:
        typer.BadParameter: if it is no such word.

    Example:

    ```python
    >>> from transformers_emo.commands.analysis.routing import read_share
    >>> read_share("2/8")
    Share(number=1, of=8)

    ```
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise typer.BadParameter(f"{text!r} is no share: write 1/4 to 4/4 for four processes")
    return Share(int(match[1]) - 1, int(match[2]))


def read_languages(words: list[str] | None) -> dict[str, str]:
    """Read `DOMAIN=LANGUAGE`, several of them.

    Args:
        words (`list[str]`, *optional*): the words of the command.

    Raises:
        typer.BadParameter: if there is no `=`.

    Example:

    ```python
    >>> from transformers_emo.commands.analysis.routing import read_languages
    >>> read_languages(["english=en", "german=de"])
    {'english': 'en', 'german': 'de'}

    ```
    """
    pairs = [Setting(*word.partition("=")[::2]) for word in words or ()]
    for word, (name, language) in zip(words or (), pairs, strict=True):
        if not name or not language:
            raise typer.BadParameter(f"{word!r} is not DOMAIN=LANGUAGE: write it like english=en")
    return dict(pairs)


def text_source(texts: str, dataset_split: str | None) -> Any:
    """What `documents_of` reads: a folder or file, or the stream of a dataset.

    Args:
        texts (`str`): the folder, file or dataset.
        dataset_split (`str`, *optional*): the split of the dataset.

    Raises:
        ImportError: if it is a dataset and `datasets` is not installed.

    Example:

    ```python
    >>> from transformers_emo.commands.analysis.routing import text_source
    >>> text_source("model_cards/toy-emo/documents", None)
    'model_cards/toy-emo/documents'

    ```
    """
    if dataset_split is None:
        return texts
    from transformers_emo.imports.optional_packages import import_optional

    datasets = import_optional("datasets", "--dataset-split needs")
    return datasets.load_dataset(texts, split=dataset_split, streaming=True)


def routing(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub repository.")],
    texts: Texts,
    out: Annotated[
        str, typer.Option(metavar="DIR", help="Where the parquet files go.", rich_help_panel=OUTPUT)
    ],
    dataset_split: DatasetSplit = None,
    column: Column = "text",
    domain_column: DomainColumn = "domain",
    max_texts: MaxTexts = None,
    window: Window = None,
    languages: Languages = None,
    tokens: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            help="Keep the picks of the first N tokens of a document one by one.",
            rich_help_panel=OUTPUT,
        ),
    ] = 512,
    vectors: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, help="Keep all probabilities of the first N of these.", rich_help_panel=OUTPUT
        ),
    ] = 128,
    part: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            help="Documents in a part. For each part every layer is read once, and a part that is not "
            "finished is begun again.",
            rich_help_panel=RUNNING,
        ),
    ] = 256,
    process: Annotated[
        str,
        typer.Option(
            metavar="I/N",
            help="Do the I-th of N shares of the parts. Start N processes with one folder --out.",
            rich_help_panel=RUNNING,
        ),
    ] = "1/1",
    batch_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="Documents in a batch.", rich_help_panel=RUNNING)
    ] = 8,
    dtype: Dtype = None,
    device: Device = "cpu",
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    json: AsJson = False,
) -> None:
    """Write down which experts the tokens of documents go to.

    The layers are read one after the other, and the whole model is never in memory. For each document and
    layer the files hold how much the router wants each expert, how often it takes it, and how sure it is.
    After an interruption, the same command goes on.

    Example:

    ```python
    >>> from transformers_emo.cli import main
    >>> toy = "model_cards/toy-emo"
    >>> main(["routing", toy, "--texts", f"{toy}/documents", "--max-texts", "4", "--out", str(tmp_path)])
    4 documents in 1 part: .../documents-*.parquet and tokens-*.parquet
    0

    ```
    """
    from transformers_emo.analysis.routing import documents_of, router_statistics

    share, language_of = read_share(process), read_languages(languages)
    with stdout_for_json(json):
        found = router_statistics(
            model,
            documents_of(
                text_source(texts, dataset_split), text=column, domain=domain_column, limit=max_texts
            ),
            out,
            process=share,
            documents_per_part=part,
            window=window,
            tokens_per_document=tokens,
            vectors_per_document=vectors,
            languages=language_of,
            batch_size=batch_size,
            dtype=dtype,
            device=device,
            **given(revision=revision, token=token, cache_dir=cache_dir),
        )
    number = found.num_documents
    parts = -(-number // part)
    told = f"{number} documents in {parts} part{'s' * (parts != 1)}"
    tell(
        json,
        f"{told}: {out}/documents-*.parquet and tokens-*.parquet",
        out=out,
        documents=number,
        parts=parts,
    )
