"""Training from a recipe file: which model, which data, which settings; what `emo train` runs."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
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

_HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class _Loader(yaml.SafeLoader):
    """YAML as in version 1.2, where 4e-3 is a number; PyYAML's 1.1 reads it as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


@strict
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
        options (`dict`): more arguments of `from_pretrained`, such as `dtype` or `revision`; from scratch of
            `from_config`, and of the Hub.

    Raises:
        ValueError: if a model from scratch is to have a subset of experts.

    Example: see `Recipe`.
    """

    path: str
    from_scratch: bool = False
    tokenizer: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    expert_subset: Any = None
    train: What = "all"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.from_scratch and self.expert_subset is not None:
            raise ValueError(
                "A model `from_scratch` loads no weights: it has no use for `expert_subset`. For fewer "
                "experts set `num_experts` in `config`."
            )

    @property
    def hub(self) -> dict[str, Any]:
        """Those of the options that say where on the Hub the model is."""
        return {name: value for name, value in self.options.items() if name in _HUB_KWARGS}


@strict
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

    Raises:
        ValueError: if the columns do not go together, or `pack` is set for documents.

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
        if self.pack and not self.has_answers:
            raise ValueError("`pack` is for examples with answers: documents are always packed.")

    @property
    def has_answers(self) -> bool:
        """Whether only answers are trained on."""
        return self.prompt is not None or self.messages is not None


@strict
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
        ValueError: if a section or a setting is unknown, missing or of the wrong kind, or two of them cannot
            be true together.

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

    def __post_init__(self):
        if self.lora is not None and self.model.train != "all":
            raise ValueError(
                f"`model.train` is {self.model.train!r} and there is `lora`, where only the adapter trains: "
                "leave one of them out."
            )
        if self.evaluation is not None and self.evaluation.pack:
            raise ValueError(
                "Packed examples would see each other in `evaluation`: attention is kept within documents in "
                "training only. Set `pack: false` there."
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Recipe":
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
    def read(cls, file: str | os.PathLike, changes: Mapping[str, Any] | None = None) -> "Recipe":
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
            data = read_yaml(Path(file).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{os.fspath(file)} is no YAML file: {error}") from error
        if not isinstance(data, dict):
            raise ValueError(f"{os.fspath(file)} holds no sections: expected `recipe`, `model`, `data` ...")
        for name, value in (changes or {}).items():
            *sections, setting = name.split(".")
            section = data
            for part in sections:
                if section.get(part) is None:
                    section[part] = {}
                section = section[part]
                if not isinstance(section, dict):
                    raise ValueError(f"Cannot set `{name}`: `{part}` holds {section!r}, not settings.")
            section[setting] = value
        return cls.from_dict(data)


def read_yaml(text: str) -> Any:
    """Read YAML, with the numbers of version 1.2: `4e-3` is one, and not a text.

    Args:
        text (`str`): what a recipe file or one of its values holds.

    Raises:
        yaml.YAMLError: if it is no YAML.

    Example:

    ```python
    >>> from transformers_emo.training.runs import read_yaml
    >>> read_yaml("learning_rate: 4e-3")
    {'learning_rate': 0.004}

    ```
    """
    return yaml.load(text, Loader=_Loader)  # a `SafeLoader`


def train(recipe: Recipe, *, resume: bool = False) -> EmoTrainer:
    """Train as a recipe says, and save the model (or the adapter) and the tokenizer in its `output_dir`.

    Args:
        recipe (`Recipe`): what to do.
        resume (`bool`, defaults to `False`): go on from the last whole checkpoint in `output_dir`, if there
            is one.

    Returns:
        `EmoTrainer`: after training; `trainer.state.log_history` holds the logs.

    Raises:
        ValueError: if `output_dir` holds checkpoints and `resume` is not set, a setting does not fit, or
            there is nothing to train on.
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
    Path(recipe.output_dir).mkdir(parents=True, exist_ok=True)
    set_seed(arguments.seed)
    config = _load_config(recipe)
    if recipe.model.tokenizer is None:
        tokenizer = EmoTokenizer.from_pretrained(recipe.model.path, **recipe.model.hub)
    else:
        tokenizer = EmoTokenizer.from_pretrained(recipe.model.tokenizer)
    _check_vocabulary(recipe, tokenizer, config)
    with arguments.main_process_first(desc="tokenising"):
        windows = _load_data(recipe.data, tokenizer, "data")
        evaluation = None
        if recipe.evaluation is not None:
            evaluation = _load_data(recipe.evaluation, tokenizer, "evaluation")
    model = _load_model(recipe, config)
    # Windows of documents are full. Padded to one length, they would all bring a mask that masks nothing.
    collator = DocumentCollator(model.config, window=recipe.data.window if recipe.data.pack else None)
    trained: Any = model
    if recipe.lora is not None:
        from peft import get_peft_model

        from .adapters import lora_config

        try:
            adapter = lora_config(model, **recipe.lora)
        except TypeError as error:
            raise ValueError(f"The section `lora` is not right: {error}.") from error
        trained = get_peft_model(model, adapter)
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
        `str`, *optional*: its path. `Trainer` writes `trainer_state.json` last: a checkpoint without it, or
        with a part of it, was cut short.

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
    try:
        return cls(**{name: value for name, value in data.items() if value is not None})
    except StrictDataclassError as error:
        raise ValueError(f"The {where} is not right: {error.__cause__ or error}") from error


def _arguments(recipe: Recipe) -> TrainingArguments:
    try:
        return training_arguments(recipe.recipe, recipe.output_dir, **recipe.training)
    except TypeError as error:  # an unknown setting, which Python names
        raise ValueError(f"The section `training` is not right: {error}.") from error


def _load_data(
    section: DataSection, tokenizer: Any, where: str
) -> "datasets.Dataset | datasets.IterableDataset | PackedStream":
    import datasets

    try:
        dataset = datasets.load_dataset(**section.load)
    except TypeError as error:
        raise ValueError(f"`{where}.load` is not what `datasets.load_dataset` takes: {error}.") from error
    except StopIteration as error:
        raise ValueError(f"`{where}.load` names files without a row.") from error
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(f"`{where}.load` names files that cannot be read: {error.__cause__}") from error
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
    # A stream finds out about its rows only as it is read, which is best before the model is.
    if not isinstance(windows, datasets.Dataset) and next(iter(windows), None) is None:
        raise ValueError(f"`{where}` streams nothing that fills a window of {section.window} tokens.")
    return windows


def _load_config(recipe: Recipe) -> EmoConfig:
    section = recipe.model
    # The paper fine-tunes without pools, also where the model was trained with them.
    pools_off = {"document_pool_min": None, "document_pool_max": None} if recipe.recipe == "fine-tune" else {}
    try:
        config, unknown = EmoConfig.from_pretrained(
            section.path, return_unused_kwargs=True, **section.hub, **pools_off | section.config
        )
        config.validate()  # settings that do not go together
    except StrictDataclassError as error:
        raise ValueError(f"The section `model.config` is not right: {error.__cause__ or error}") from error
    if unknown:
        raise ValueError(
            f"The section `model.config` has settings that `EmoConfig` does not know: {list(unknown)}."
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
    """That of ids in the data themselves shows in `DocumentCollator`."""
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if recipe.data.ids is None and largest >= config.vocab_size:
        raise ValueError(
            f"The tokenizer has ids up to {largest}, and {recipe.model.path} a `vocab_size` of "
            f"{config.vocab_size}: name the tokenizer that belongs to it as `model.tokenizer`, or from "
            "scratch set `vocab_size` in `model.config`."
        )


def _load_model(recipe: Recipe, config: EmoConfig) -> EmoForCausalLM:
    section = recipe.model
    if section.from_scratch:
        options = {name: value for name, value in section.options.items() if name not in _HUB_KWARGS}
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
