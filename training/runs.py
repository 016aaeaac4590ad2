"""Runs the training that a recipe describes, for `emo train` and for callers in Python."""

import json
import multiprocessing
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, TrainingArguments, set_seed

from ..checkpoints.hub.names import HUB_KWARGS, folder_or_repo, pinned
from ..checkpoints.source_files import LOADED_FILES, SourceFiles, unchanged
from ..checkpoints.writing.durable_files import sync_tree
from ..checkpoints.writing.folder_lock import locked_folder
from ..configuration import EmoConfig
from ..imports.optional_packages import require
from ..imports.transformers_versions import private_names
from ..modeling_emo import EmoForCausalLM
from ..tokenization import EmoTokenizer, PackedStream, encode_answers, pack_dataset
from .adapters import lora_config
from .collator import DocumentCollator
from .fine_tuning import train_only
from .recipe_files import DataSection, Recipe
from .recipes import training_arguments
from .routing_monitor import RoutingMonitor
from .trainer import EmoTrainer

with private_names("trainer"):
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

if TYPE_CHECKING:
    import datasets


def train(recipe: Recipe, *, resume: bool = False) -> EmoTrainer:
    """Train as a recipe says, and save the model (or the adapter) and the tokenizer in its `output_dir`.

    Args:
        recipe (`Recipe`): what to do.
        resume (`bool`, defaults to `False`): continue from the last complete checkpoint in `output_dir`, if
            there is one.

    Returns:
        `EmoTrainer`: after training; `trainer.state.log_history` holds the logs.

    Raises:
        ValueError: if `output_dir` holds checkpoints and `resume` is not set, a setting does not fit, or
            there is nothing to train on.
        ImportError: without `datasets` or `accelerate`, or `peft` for an adapter.
        BlockingIOError: if another run trains into `output_dir`.
        SourceChangedError: if the model's folder changes while it is loaded.

    Example:

    ```python
    >>> from transformers_emo.training import Recipe, train
    >>> recipe = Recipe.read(
    ...     "examples/recipes/pretrain.yaml",
    ...     {"training.max_steps": 1, "training.disable_tqdm": True, "output_dir": str(tmp_path)},
    ... )
    >>> trainer = train(recipe)  # doctest: +ELLIPSIS
    {...}
    >>> trainer.state.global_step
    1

    ```
    """
    # Of the processes of one run, the first holds the lock.
    is_first = os.environ.get("RANK", "0") == "0"
    with locked_folder(recipe.output_dir) if is_first else nullcontext():
        trainer = _train(recipe, resume)
        if is_first:
            sync_tree(recipe.output_dir)
    return trainer


def _train(recipe: Recipe, resume: bool) -> EmoTrainer:
    checkpoint = last_checkpoint(recipe.output_dir)
    if checkpoint is not None and not resume:
        raise ValueError(
            f"{recipe.output_dir} holds the checkpoints of another run: resume it (`--resume`), or choose "
            "another `output_dir`."
        )
    files = SourceFiles.of(
        recipe.model.path, patterns=LOADED_FILES, subfolder=recipe.model.hub.get("subfolder")
    )
    with unchanged(files):
        trainer = build_trainer(recipe)
    with _quiet_workers():
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    return trainer


@contextmanager
def _quiet_workers() -> Iterator[None]:
    """Let a worker that reads data say nothing where the run ends while it hands over a batch.

    Its thread tells of the broken connection through `sys.excepthook`, beside what ended the run.
    """
    before = sys.excepthook

    def hook(kind, error, trace) -> None:
        broken = isinstance(error, OSError | EOFError | multiprocessing.AuthenticationError)
        if multiprocessing.parent_process() is None or not broken:
            before(kind, error, trace)

    sys.excepthook = hook
    try:
        yield
    finally:
        sys.excepthook = before


def build_trainer(recipe: Recipe, *, trainer_class: type[EmoTrainer] = EmoTrainer) -> EmoTrainer:
    """Load what a recipe names and make its trainer, ready to `train`.

    Args:
        recipe (`Recipe`): what to do.
        trainer_class (`type[EmoTrainer]`, *optional*): a trainer of your own.

    Raises:
        ValueError: if a setting does not fit, or there is nothing to train on.
        ImportError: without `datasets` or `accelerate`, or `peft` for an adapter.

    Example:

    ```python
    >>> from transformers_emo.training import Recipe, build_trainer
    >>> recipe = Recipe.read("examples/recipes/pretrain.yaml", {"output_dir": str(tmp_path)})
    >>> trainer = build_trainer(recipe)
    >>> len(trainer.train_dataset[0]["input_ids"]) == recipe.data.window
    True

    ```
    """
    require("Training needs", "accelerate", "datasets", *([] if recipe.lora is None else ["peft"]))
    arguments = _arguments(recipe)
    Path(recipe.output_dir).mkdir(parents=True, exist_ok=True)
    set_seed(arguments.seed)
    pinned(recipe.model.path, recipe.model.hub)  # so that a wrong path has an error of its own
    config = _load_config(recipe)
    if recipe.model.tokenizer is None:
        tokenizer = EmoTokenizer.from_pretrained(recipe.model.path, **recipe.model.hub)
    else:
        with folder_or_repo(recipe.model.tokenizer):
            # The revision is the model's.
            hub = {name: value for name, value in recipe.model.hub.items() if name in ("token", "cache_dir")}
            tokenizer = EmoTokenizer.from_pretrained(recipe.model.tokenizer, **hub)
    _check_vocabulary(recipe, tokenizer, config)
    if recipe.model.from_scratch:  # the tokenizer of another model, saved as the one of this model
        tokenizer.model_max_length = config.max_position_embeddings
    with arguments.main_process_first(desc="tokenising"):
        windows = _load_data(recipe.data, tokenizer, "data")
        evaluation = None
        if recipe.evaluation is not None:
            evaluation = _load_data(recipe.evaluation, tokenizer, "evaluation")
    model = _load_model(recipe, config)
    # Windows of documents are full. With a fixed length they would all bring a mask that masks nothing.
    collator = DocumentCollator(model.config, window=recipe.data.window if recipe.data.pack else None)
    trained: Any = model
    if recipe.lora is not None:
        from peft import get_peft_model  # optional

        try:
            adapter = lora_config(model, **recipe.lora)
        except TypeError as error:
            raise ValueError(f"The section `lora` is not right: {error}.") from error
        with warnings.catch_warnings():  # PEFT misses modules of these names; they are names of parameters
            warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys .*gate_up_proj")
            trained = get_peft_model(model, adapter)
    trainer = trainer_class(
        trained,
        arguments,
        collator,
        windows,
        evaluation,
        processing_class=tokenizer,
        exact_balance=recipe.exact_balance,
    )
    if recipe.routing_monitor:
        trainer.add_callback(RoutingMonitor(trainer))
    return trainer


def last_checkpoint(folder: str | os.PathLike) -> str | None:
    """The last complete checkpoint of `Trainer` in a folder.

    Args:
        folder (`str` or `os.PathLike`): an `output_dir`; it need not exist.

    Returns:
        `str`, *optional*: its path. `Trainer` writes `trainer_state.json` last: a checkpoint without a whole
        one is incomplete.

    Example:

    ```python
    >>> from transformers_emo.training import last_checkpoint
    >>> (tmp_path / "checkpoint-20").mkdir()
    >>> last_checkpoint(tmp_path) is None
    True

    ```
    """
    numbers = {
        int(number): state.parent
        for state in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*/trainer_state.json")
        if (number := state.parent.name.rpartition("-")[2]).isdigit() and _is_json(state)
    }
    return str(numbers[max(numbers)]) if numbers else None


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def _arguments(recipe: Recipe) -> TrainingArguments:
    try:
        return training_arguments(recipe.recipe, recipe.output_dir, **recipe.training)
    except TypeError as error:  # an unknown setting; the error names it
        raise ValueError(f"The section `training` is not right: {error}.") from error


def _load_data(
    section: DataSection, tokenizer: Any, where: str
) -> "datasets.Dataset | datasets.IterableDataset | PackedStream":
    import datasets  # optional

    try:
        dataset = datasets.load_dataset(**section.load)
    except TypeError as error:
        raise ValueError(f"`{where}.load` is not what `datasets.load_dataset` takes: {error}.") from error
    except StopIteration as error:
        raise ValueError(f"`{where}.load` names files without a row: name files that hold data.") from error
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(
            f"`{where}.load` names files that cannot be read: {error.__cause__}. Correct the files or the "
            "format that `path` names."
        ) from error
    if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        raise ValueError(f"`{where}.load` gives the splits {list(dataset)}: name one as `split`.")
    if section.has_answers:
        columns: dict[str, Any] = {
            "prompt": section.prompt,
            "answer": section.answer,
            "messages": section.messages,
        }
        windows = encode_answers(
            dataset,
            tokenizer=tokenizer,
            **{name: column for name, column in columns.items() if column is not None},
            max_length=section.window,
            pack=section.pack,
            num_proc=section.num_proc,
        )
    else:
        source = {"eos_token_id": tokenizer.eos_token_id} if section.ids else {"tokenizer": tokenizer}
        windows = pack_dataset(
            dataset,
            **source,
            column=section.ids or section.text,
            window=section.window,
            num_proc=section.num_proc,
        )
    # A stream checks its rows only when it is read: read one now, before the model is loaded.
    if not isinstance(windows, datasets.Dataset) and next(iter(windows), None) is None:
        raise ValueError(
            f"`{where}` streams nothing that fills a window of {section.window} tokens: give more data, or a "
            "smaller `window`."
        )
    return windows


def _load_config(recipe: Recipe) -> EmoConfig:
    section = recipe.model
    # The paper fine-tunes without pools, even if the model was trained with them.
    pools_off = {"document_pool_min": None, "document_pool_max": None} if recipe.recipe == "fine-tune" else {}
    try:
        config, unknown = EmoConfig.from_pretrained(
            section.path, return_unused_kwargs=True, **section.hub, **pools_off | section.config
        )
        config.validate()  # settings that do not go together
    except (StrictDataclassError, ValueError) as error:
        reason: BaseException = error
        while reason.__cause__ is not None:  # the innermost error says what is wrong
            reason = reason.__cause__
        raise ValueError(f"The section `model.config` is not right: {reason}") from error
    if unknown:
        raise ValueError(
            f"The section `model.config` has settings that `EmoConfig` does not know: {list(unknown)}. "
            "Correct their names, or remove them."
        )
    if recipe.recipe == "anneal" and config.document_pool_min is None:
        raise ValueError(
            f"{section.path} has no document pools to anneal with: set `document_pool_min` and "
            "`document_pool_max` in `model.config`."
        )
    if recipe.data.pack and not config.attention_within_documents:
        raise ValueError(
            "Packed examples would see each other: set `attention_within_documents: true` in `model.config`, "
            "or `pack: false`."
        )
    return config


def _check_vocabulary(recipe: Recipe, tokenizer: Any, config: EmoConfig) -> None:
    """Refuse a tokenizer with ids that the model lacks. (`DocumentCollator` checks the ids of the data.)"""
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if recipe.data.ids is None and largest >= config.vocab_size:
        raise ValueError(
            f"The tokenizer has ids up to {largest}, and {recipe.model.path} a `vocab_size` of "
            f"{config.vocab_size}: name the model's own tokenizer as `model.tokenizer`, or, for a "
            "model from scratch, set `vocab_size` in `model.config`."
        )


def _load_model(recipe: Recipe, config: EmoConfig) -> EmoForCausalLM:
    section = recipe.model
    if section.from_scratch:
        options = {name: value for name, value in section.options.items() if name not in HUB_KWARGS}
        load = partial(AutoModelForCausalLM.from_config, config, **options)
    else:
        load = partial(
            EmoForCausalLM.from_pretrained,
            section.path,
            config=config,
            expert_subset=section.expert_subset,
            **section.options,
        )
    try:
        model = load()
    except TypeError as error:
        raise ValueError(f"`model.options` are not right: {error}.") from error
    if recipe.lora is None:
        train_only(model, section.train)
    return model
