"""Training from a recipe file: which model, which data, which settings; what `emo train` runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from transformers import AutoModelForCausalLM, TrainingArguments, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..configuration import EmoConfig
from ..modeling_emo import EmoForCausalLM
from ..tokenization import EmoTokenizer, PackedStream, encode_answers, pack_dataset
from .collator import DocumentCollator
from .fine_tuning import What, train_only
from .recipes import RecipeName, training_arguments
from .trainer import EmoTrainer

if TYPE_CHECKING:
    import datasets


@dataclass(kw_only=True)
class ModelSection:
    """The section `model` of a recipe.

    Args:
        path (`str`): a folder or Hub repository to start from.
        from_scratch (`bool`): take only the config from there, and new weights.
        tokenizer (`str`, *optional*): a folder or Hub repository; `path` by default.
        config (`dict`): settings of `EmoConfig` to change, pools for example.
        expert_subset (*optional*): load only these experts; as for `from_pretrained`.
        train (`str`): what trains; as for `train_only`.
        options (`dict`): more arguments of `from_pretrained` (or of `from_config`, from scratch), such as `dtype`
            or `attn_implementation`.

    Example: see `Recipe`.
    """

    path: str
    from_scratch: bool = False
    tokenizer: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    expert_subset: Any = None
    train: What = "all"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class DataSection:
    """The sections `data` and `evaluation` of a recipe.

    Documents, from `text` or `ids`, are packed into windows. Questions with answers, from `prompt` and
    `answer` or from `messages`, stay apart, and only answers are trained on.

    Args:
        load (`dict`): arguments of `datasets.load_dataset`.
        text (`str`, *optional*): the column of texts; `"text"` if no other column is named.
        ids (`str`, *optional*): or that of token ids.
        prompt, answer (`str`, *optional*): or those of questions and of answers.
        messages (`str`, *optional*): or that of chats.
        window (`int`): tokens of a window; for answers, of the longest example that is kept.
        pack (`bool`): put several short examples with answers into one window.
        num_proc (`int`, *optional*): processes that tokenise.

    Example: see `Recipe`.
    """

    load: dict[str, Any]
    text: str | None = None
    ids: str | None = None
    prompt: str | None = None
    answer: str | None = None
    messages: str | None = None
    window: int = 4096
    pack: bool = False
    num_proc: int | None = None

    def __post_init__(self):
        named = [name for name in ("text", "ids", "prompt", "messages") if getattr(self, name)]
        if len(named) > 1 or bool(self.prompt) != bool(self.answer):
            columns = named + (["answer"] if self.answer else [])
            raise ValueError(
                f"The data names the columns {columns}: expected `text`, `ids`, `messages`, or `prompt` and "
                "`answer`."
            )
        if not named:
            self.text = "text"

    @property
    def has_answers(self) -> bool:
        """Whether only answers are trained on."""
        return self.prompt is not None or self.messages is not None

    @property
    def is_packed(self) -> bool:
        """Whether all windows have the same length."""
        return self.pack or not self.has_answers


@dataclass(kw_only=True)
class Recipe:
    """A training run: a YAML file with these sections, or the same as a `dict`.

    Args:
        recipe (`str`): `"pretrain"`, `"anneal"` or `"fine-tune"`; see `training_arguments`.
        output_dir (`str`): for checkpoints, and at the end the model.
        model (`ModelSection`): what to start from.
        data (`DataSection`): what to train on.
        evaluation (`DataSection`, *optional*): what to evaluate on; `training.eval_strategy` says when.
        training (`dict`): arguments of `training_arguments`, so any of `TrainingArguments`.
        lora (`dict`, *optional*): train a LoRA adapter; arguments of `lora_config`.
        exact_balance (`bool`): as for `EmoTrainer`.

    Raises:
        ValueError: if a section or a setting is unknown, missing or of the wrong kind.

    Example:

    ```python
    >>> from transformers_emo.training import Recipe
    >>> recipe = Recipe.from_dict(
    ...     {
    ...         "recipe": "pretrain",
    ...         "output_dir": str(tmp_path),
    ...         "model": {"path": "model_cards/toy-emo", "from_scratch": True},
    ...         "data": {"load": {"path": "json", "data_files": "texts.jsonl", "split": "train"}},
    ...     }
    ... )
    >>> recipe.data.text, recipe.data.window
    ('text', 4096)

    ```
    """

    recipe: RecipeName
    output_dir: str
    model: ModelSection
    data: DataSection
    evaluation: DataSection | None = None
    training: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] | None = None
    exact_balance: bool = False

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Read what a file holds.

        Args:
            data (`Mapping`): sections by name.

        Raises:
            ValueError: as the class says.

        Example: see `Recipe`.
        """
        data = dict(data)
        sections = {"model": ModelSection, "data": DataSection, "evaluation": DataSection}
        for name, section in sections.items():
            if data.get(name) is not None:
                data[name] = _checked(section, data[name], f"section `{name}`")
        return _checked(cls, data, "recipe")

    @classmethod
    def read(cls, file: str | os.PathLike, changes: Mapping[str, Any] | None = None) -> Recipe:
        """Read a YAML file.

        Args:
            file (`str` or `os.PathLike`): the file. Paths in it are relative to where the command runs.
            changes (`Mapping`, *optional*): settings instead of the file's, by dotted name, such as
                `{"training.max_steps": 10}`.

        Raises:
            ValueError: as the class says, or if the file is no YAML.
            FileNotFoundError: if there is no such file.

        Example:

        ```python
        >>> from transformers_emo.training import Recipe
        >>> Recipe.read("examples/recipes/pretrain.yaml", {"training.max_steps": 3}).training["max_steps"]
        3

        ```
        """
        try:
            data = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{os.fspath(file)} is no YAML file: {error}") from error
        if not isinstance(data, dict):
            raise ValueError(f"{os.fspath(file)} holds no sections: expected `recipe`, `model`, `data` ...")
        for name, value in (changes or {}).items():
            *sections, setting = name.split(".")
            section = data
            for part in sections:
                section = section.setdefault(part, {})
                if not isinstance(section, dict):
                    raise ValueError(f"Cannot set `{name}`: `{part}` holds {section!r}, not settings.")
            section[setting] = value
        return cls.from_dict(data)


def train(recipe: Recipe, *, resume: bool = False) -> EmoTrainer:
    """Train as a recipe says, and save the model (or the adapter) and the tokenizer in its `output_dir`.

    Args:
        recipe (`Recipe`): what to do.
        resume (`bool`, defaults to `False`): go on from the last whole checkpoint in `output_dir`, if there
            is one.

    Returns:
        `EmoTrainer`: after training; `trainer.state.log_history` holds the logs.

    Raises:
        ValueError: if `output_dir` holds checkpoints and `resume` is not set, or a setting does not fit.
        ImportError: without `datasets` or `accelerate`.

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
    arguments = _arguments(recipe)
    checkpoint = last_checkpoint(recipe.output_dir)
    if checkpoint is not None and not resume:
        raise ValueError(
            f"{recipe.output_dir} holds the checkpoints of another run: resume it (`--resume`), or choose "
            "another `output_dir`."
        )
    set_seed(arguments.seed)
    tokenizer = EmoTokenizer.from_pretrained(recipe.model.tokenizer or recipe.model.path)
    with arguments.main_process_first(desc="tokenising"):
        windows = _load_data(recipe.data, tokenizer, "data")
        evaluation = None
        if recipe.evaluation is not None:
            evaluation = _load_data(recipe.evaluation, tokenizer, "evaluation")
    model = _load_model(recipe)
    collator = DocumentCollator(model.config, window=recipe.data.window if recipe.data.is_packed else None)
    trained: Any = model
    if recipe.lora is not None:
        from peft import get_peft_model

        from .adapters import lora_config

        trained = get_peft_model(model, lora_config(model, **recipe.lora))
    trainer = EmoTrainer(
        trained,
        arguments,
        collator,
        windows,
        evaluation,
        processing_class=tokenizer,
        exact_balance=recipe.exact_balance,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    return trainer


def last_checkpoint(folder: str | os.PathLike) -> str | None:
    """The last checkpoint of `Trainer` in a folder that was written to its end.

    Args:
        folder (`str` or `os.PathLike`): an `output_dir`; it need not exist.

    Returns:
        `str`, *optional*: its path. `Trainer` writes `trainer_state.json` last: a checkpoint without it was
        cut short.

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
        if (number := state.parent.name.rpartition("-")[2]).isdigit()
    }
    return str(numbers[max(numbers)]) if numbers else None


def _checked(cls: Any, data: Any, where: str) -> Any:
    """`cls(**data)`, with an error that names what is unknown or missing."""
    if not isinstance(data, Mapping):
        raise ValueError(f"The {where} holds {data!r}, expected settings by name.")
    known = {f.name: f for f in fields(cls)}
    if unknown := sorted(set(data) - set(known)):
        raise ValueError(f"The {where} has no settings {unknown}: expected some of {list(known)}.")
    needed = [name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in needed if data.get(name) is None]:
        raise ValueError(f"The {where} lacks {missing}.")
    return cls(**{name: value for name, value in data.items() if value is not None})


def _arguments(recipe: Recipe) -> TrainingArguments:
    try:
        return training_arguments(recipe.recipe, recipe.output_dir, **recipe.training)
    except TypeError as error:  # an unknown setting, which Python names
        raise ValueError(f"The section `training` is not right: {error}.") from error


def _load_data(
    section: DataSection, tokenizer: Any, where: str
) -> datasets.Dataset | datasets.IterableDataset | PackedStream:
    import datasets

    try:
        dataset = datasets.load_dataset(**section.load)
    except TypeError as error:
        raise ValueError(f"`{where}.load` is not what `datasets.load_dataset` takes: {error}.") from error
    if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        raise ValueError(f"`{where}.load` gives the splits {list(dataset)}: name one as `split`.")
    if section.has_answers:
        columns: dict[str, Any] = {
            "prompt": section.prompt,
            "answer": section.answer,
            "messages": section.messages,
        }
        return encode_answers(
            dataset,
            tokenizer=tokenizer,
            **{name: column for name, column in columns.items() if column is not None},
            max_length=section.window,
            pack=section.pack,
            num_proc=section.num_proc,
        )
    source = {"eos_token_id": tokenizer.eos_token_id} if section.ids else {"tokenizer": tokenizer}
    return pack_dataset(
        dataset,
        **source,
        column=section.ids or section.text,
        window=section.window,
        num_proc=section.num_proc,
    )


def _load_model(recipe: Recipe) -> EmoForCausalLM:
    section = recipe.model
    # The paper fine-tunes without pools, also where the model was trained with them.
    pools_off = {"document_pool_min": None, "document_pool_max": None} if recipe.recipe == "fine-tune" else {}
    config = EmoConfig.from_pretrained(section.path, **pools_off | section.config)
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
    if section.from_scratch:
        model = AutoModelForCausalLM.from_config(config, **section.options)
    else:
        model = EmoForCausalLM.from_pretrained(
            section.path, config=config, expert_subset=section.expert_subset, **section.options
        )
    if recipe.lora is None:
        train_only(model, section.train)
    return model
