"""The command `emo run`."""

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..command_words import EmoCommand
from .shared import excluded_experts

if TYPE_CHECKING:
    from transformers_emo.subsets.loading.choice.run_choice import RunChoice

_STARTUP = Path(__file__).parents[1] / "startup"
# A repository of the Hub: which of several models will be loaded cannot be said beforehand.
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")

EPILOG = """\
Examples:

`emo run -- lm_eval --model hf --model_args pretrained=model_cards/emo-tiny --tasks ...`

`emo run --expert-subset python -- transformers serve model_cards/emo-tiny`

`emo run --document-pool 16 -- torchrun --nproc-per-node 2 train.py`

`emo run -m trl sft --model_name_or_path model_cards/emo-tiny ...`
"""


class RunCommand(EmoCommand):
    """`emo run` hands on the words of another program, as they are.

    They begin behind `--`, with `-m`, or with the first word that is no option.

    Example: see `run`.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words behind `emo run`. Typer calls this."""
        options = self.options(ctx)
        position = 0
        while position < len(args) and args[position].startswith("-") and args[position] != "--":
            word = args[position]
            if word.startswith("-m"):
                module = ["-m", word[2:]] if word != "-m" else ["-m"]
                args = [*args[:position], "--", *module, *args[position + 1 :]]
                break
            option = options.get(word)
            position += 1 if option is None or option.is_flag else 2
        return super().parse_args(ctx, args)


def _pool_size(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is no number of experts: expected an integer from 1")
    return int(text)


def run(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="COMMAND", help="A console script, `python`, or a .py file, with its arguments."
        ),
    ] = None,
    module: Annotated[
        str | None, typer.Option("-m", metavar="MODULE", help="A module, as after `python -m`.")
    ] = None,
    expert_subset: Annotated[
        str | None,
        typer.Option(
            metavar="SUBSET",
            help="JSON file, or the name of one in the model's subsets/.",
            rich_help_panel="Choice of experts",
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LAYER:ID,ID",
            help="Experts never to load. May be repeated. Or a subset's JSON file or name.",
            rich_help_panel="Choice of experts",
        ),
    ] = None,
    document_pool: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            parser=_pool_size,
            help="Routed experts in the pool of a document.",
            rich_help_panel="Choice of experts",
        ),
    ] = None,
) -> None:
    """Start another Python program with EMO known to it.

    EMO is registered with Transformers in the program, and in the Python processes that it starts. If wanted,
    they have a choice of experts too. It holds for every EMO model that `from_pretrained` loads there, unless
    the program itself gives expert_subset or exclude_experts. A model that the choice does not fit is an
    error. One line on stderr tells of each model, and one at the end if none was loaded.

    Document pools: `generate` chooses them from each prompt. A forward outside it, such as scoring in
    lm_eval, takes each row for one document: what is scored has a say in the pool that it is scored with.
    Padding has none, so several rows need an attention mask. lm_eval gives none: use --batch_size 1. In
    training, and where the program says which tokens are one document, each document has a pool of its own.

    Example:

    ```python
    >>> from transformers_emo.cli import main
    >>> main(["run", "--", "no-such-tool"])
    1

    ```
    """
    from ..run_target import find_target

    words = words or []
    target = find_target(words)
    choice = _choice(expert_subset, exclude or [], document_pool)
    if target.cut_off is not None:
        ignores = f"Python with {target.cut_off} ignores what `emo run` tells it"
        if choice is not None:
            raise ValueError(f"{ignores}, and `{choice}` would be lost: leave out {target.cut_off}.")
        print(f"emo run: {ignores}: EMO will not be registered.", file=sys.stderr)
    if choice is not None:
        _check_models(choice, words)
    _start(target.arguments, _environment(choice))


def _choice(expert_subset: str | None, exclude: list[str], document_pool: int | None) -> "RunChoice | None":
    if expert_subset is None and not exclude and document_pool is None:
        return None
    import secrets
    import tempfile

    from transformers_emo.subsets.loading.choice.run_choice import RunChoice

    excluded = excluded_experts(exclude)
    by_layer = {str(layer): ids for layer, ids in excluded.items()} if isinstance(excluded, dict) else None
    return RunChoice(
        _subset(expert_subset),
        _subset(excluded) if isinstance(excluded, str) else by_layer,
        document_pool,
        mark=os.path.join(tempfile.gettempdir(), f"emo-run-{secrets.token_hex(8)}"),
        pid=os.getpid(),
    )


def _subset(name: str | None) -> str | None:
    """A subset's name as it is; its file, once it is known to be one, by its full path: programs may move."""
    if name is None:
        return None
    if os.path.isfile(name) or os.path.basename(name) != name:
        from transformers_emo.subsets import ExpertSubset

        ExpertSubset.of(name)
        return os.path.abspath(name)
    return name


def _check_models(choice: "RunChoice", words: Sequence[str]) -> None:
    """Refuse a choice that fits none of the models in the command, before anything long happens.

    Models that the command does not name are checked when they are loaded, as these are once more.
    """
    errors = []
    for folder in _models_in(words):
        if folder is None:
            return
        try:
            _check_model(choice, folder)
        except ValueError as error:
            errors.append(error)
        else:
            return
    if errors:
        raise errors[0]


def _models_in(words: Sequence[str]) -> Iterator[str | None]:
    """The folders of EMO models in a command; `None` for what may be a repository of the Hub."""
    before = ""
    for word in words[1:]:
        for part in word.split(","):
            name, equals, value = part.rpartition("=")
            name = name if equals else before
            if os.path.exists(value):
                # Where results go, models of earlier runs may lie.
                if "out" not in name and _is_emo(value):
                    yield value
            elif _REPOSITORY.fullmatch(value):
                yield None
        before = word if word.startswith("-") else ""


def _is_emo(folder: str) -> bool:
    try:
        config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and str(config.get("model_type", "")).startswith("emo")


def _check_model(choice: "RunChoice", folder: str) -> None:
    from transformers_emo.configuration import EmoConfig
    from transformers_emo.modeling_emo.pools.prompt_pool import pool_sizes
    from transformers_emo.subsets.exclusion import named_exclusion, remaining_subset
    from transformers_emo.subsets.library import library_of
    from transformers_emo.subsets.reduced_config import subset_config

    config = EmoConfig.from_pretrained(folder)
    if choice.expert_subset is not None or choice.exclude_experts is not None:
        library = library_of(folder)
        excluded = named_exclusion(choice.exclude_experts, *library)
        config = subset_config(config, remaining_subset(choice.expert_subset, excluded, config, *library))
    if choice.document_pool is not None:
        pool_sizes(config, choice.document_pool)


def _environment(choice: "RunChoice | None") -> dict[str, str]:
    """This process's environment, with what makes Python processes join in."""
    from transformers_emo.subsets.loading.choice.run_choice import VARIABLE

    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    before = environment.get("PYTHONPATH")
    if str(_STARTUP) not in (before or "").split(os.pathsep):
        # An empty entry would be the working directory.
        environment["PYTHONPATH"] = os.pathsep.join([str(_STARTUP), before] if before else [str(_STARTUP)])
    return environment | (choice.variables() if choice is not None else {})


def _start(arguments: list[str], environment: dict[str, str]) -> None:
    """Become the program: its exit status, signals, input and output are its own."""
    sys.stdout.flush()
    if os.name == "nt":  # there is no becoming
        import subprocess

        raise SystemExit(subprocess.call(arguments, env=environment))
    os.execve(arguments[0], arguments, environment)
