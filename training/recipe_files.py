"""Recipe files: they name the model, the data and the settings of a training run."""

import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import yaml
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from ..checkpoints.errors import shown, tidy
from ..checkpoints.hub.names import HUB_KWARGS
from ..checkpoints.small_files import read_small
from .fine_tuning import What
from .recipes import RecipeName

_MAX_RECIPE = 1 << 20  # bytes


class _Loader(yaml.SafeLoader):
    """Reads 4e-3 as a number, as YAML 1.2 does, and refuses a name that is there twice.

    PyYAML follows YAML 1.1, where `4e-3` is text, and takes the last of two settings of one name.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"`{shown(key.value)}` is set twice, expected it once", key.start_mark
                    )
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


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
        from_scratch (`bool`): take only the config from there, and begin with new weights.
        tokenizer (`str`, *optional*): a folder or Hub repository; `path` by default.
        config (`dict`): settings of `EmoConfig` to change, pools for example.
        expert_subset (*optional*): load only these experts; as for `from_pretrained`.
        train (`str`): what trains; as for `train_only`.
        options (`dict`): more arguments of `from_pretrained`, such as `dtype` or `revision`. For a model from
            scratch: arguments of `from_config`, and those that say where on the Hub the config is.

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
        """The options that say where on the Hub the model is."""
        return {name: value for name, value in self.options.items() if name in HUB_KWARGS}


@strict
@dataclass(kw_only=True)
class DataSection:
    """The sections `data` and `evaluation` of a recipe.

    Documents, from `text` or `ids`, are packed into windows. Questions with answers, from `prompt` and
    `answer` or from `messages`, stay apart, and only answers are trained on.

    Args:
        load (`dict`): arguments of `datasets.load_dataset`.
        text (`str`, *optional*): the column of texts; `"text"` if no other column is named.
        ids (`str`, *optional*): the column of token ids, instead of texts.
        prompt, answer (`str`, *optional*): the columns of questions and of answers, instead of texts.
        messages (`str`, *optional*): the column of chats, instead of texts.
        window (`int`): tokens of a window, at least 2. For answers: the most tokens of an example.
        pack (`bool`): put several short examples with answers into one window.
        num_proc (`int`, *optional*): processes that tokenise.

    Raises:
        ValueError: if the columns do not go together, a window is too short to predict a token, or `pack` is
            set for documents.

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
        if self.window < 2:
            raise ValueError(
                f"`window` is {self.window}, expected at least 2 tokens: nothing stands before the first one "
                "of a window, so it trains nothing. Give a larger window (EMO was trained with 4096)."
            )
        if self.num_proc is not None and self.num_proc < 1:
            raise ValueError(f"`num_proc` is {self.num_proc}, expected at least 1 process, or null for one.")
        named = [name for name in ("text", "ids", "prompt", "messages") if getattr(self, name)]
        if len(named) > 1 or bool(self.prompt) != bool(self.answer):
            columns = named + (["answer"] if self.answer else [])
            raise ValueError(
                f"The data names the columns {columns}: name only `text`, only `ids`, only `messages`, or "
                "`prompt` and `answer`."
            )
        if not named:
            self.text = "text"
        if self.pack and not self.has_answers:
            raise ValueError(
                "`pack` is for examples with answers, and documents are always packed: remove `pack`."
            )

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
        training (`dict`): arguments of `training_arguments`, and with them any of `TrainingArguments`.
        lora (`dict`, *optional*): train a LoRA adapter; arguments of `lora_config`.
        exact_balance (`bool`): as for `EmoTrainer`.
        routing_monitor (`bool`): report what the routers do, and name a layer that collapses; see
            `RoutingMonitor`.

    Raises:
        ValueError: if a section or a setting is unknown, missing or of the wrong kind, or two of them
            contradict each other.

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
    routing_monitor: bool = False

    def __post_init__(self):
        if self.lora is not None and self.model.train != "all":
            raise ValueError(
                f"`model.train` is {self.model.train!r} and there is `lora`, where only the adapter trains: "
                "leave one of them out."
            )
        if self.evaluation is not None and self.evaluation.pack:
            raise ValueError(
                "Packed examples would see each other in `evaluation`: attention stays within documents only "
                "in training. Set `evaluation.pack: false`."
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Recipe":
        """Make a recipe of the contents of a file.

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
            data = read_yaml(read_small(file, _MAX_RECIPE).decode("utf-8"))
        except RecursionError as error:
            raise ValueError(f"{os.fspath(file)} is nested too deeply: a recipe has two levels.") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{os.fspath(file)} is not UTF-8 text ({error}): save it as UTF-8.") from error
        except (yaml.YAMLError, ValueError) as error:
            raise ValueError(
                f"{os.fspath(file)} is no YAML file: {tidy(str(error))}\n"
                "Correct it there, or give a recipe file."
            ) from error
        if not isinstance(data, dict):
            raise ValueError(
                f"{os.fspath(file)} holds no sections: expected `recipe`, `output_dir`, `model` and `data`. "
                "Give a recipe file."
            )
        for name, value in (changes or {}).items():
            *sections, setting = name.split(".")
            section = data
            for part in sections:
                if section.get(part) is None:
                    section[part] = {}
                section = section[part]
                if not isinstance(section, dict):
                    raise ValueError(
                        f"Cannot set `{name}`: `{part}` holds {section!r}, not settings. Set `{part}` itself."
                    )
            section[setting] = value
        return cls.from_dict(data)


def read_yaml(text: str) -> Any:
    """Read YAML with the numbers of YAML 1.2, in which `4e-3` is a number and not text.

    Args:
        text (`str`): what a recipe file or one of its values holds.

    Raises:
        yaml.YAMLError: if it is no YAML.

    Example:

    ```python
    >>> from transformers_emo.training.recipe_files import read_yaml
    >>> read_yaml("learning_rate: 4e-3")
    {'learning_rate': 0.004}

    ```
    """
    return yaml.load(text, Loader=_Loader)  # a `SafeLoader`


def _checked(cls: Any, data: Any, where: str) -> Any:
    """`cls(**data)`, with an error that names what is unknown or missing."""
    if not isinstance(data, Mapping):
        raise ValueError(
            f"The {where} holds {data!r}, expected settings by name: write them as `name: value`."
        )
    known = {f.name: f for f in fields(cls)}
    if unknown := sorted(set(data) - set(known)):
        raise ValueError(f"The {where} has no settings {unknown}: use only {list(known)}.")
    needed = [name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in needed if data.get(name) is None]:
        raise ValueError(f"The {where} lacks {missing}: add them.")
    try:
        return cls(**{name: value for name, value in data.items() if value is not None})
    except StrictDataclassError as error:
        raise ValueError(f"The {where} is not right: {error.__cause__ or error}") from error
