"""What a model that was loaded in part remembers of where it came from: its tokenizer, and its name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from pathlib import Path, PurePosixPath
from typing import Any, Self

import yaml
from huggingface_hub import HfApi, is_offline_mode
from huggingface_hub.errors import RevisionNotFoundError
from huggingface_hub.utils import httpx
from transformers.utils import logging

from ...checkpoints.hub.names import is_hub_repo
from ...checkpoints.side_files import TOKENIZER_FILES, matching, optional_file, side_files
from ..expert_subset import ExpertSubset
from ..reduced_config import held_experts

logger = logging.get_logger(__name__)


@dataclass
class Origin:
    """The model that a part was read from: enough to find it again later.

    Args:
        place (`str`): the absolute path of the folder, or the Hub repository.
        is_folder (`bool`): which of the two. A folder that is gone is no repository.
        hub_kwargs (`dict[str, Any]`): `revision`, `token`, `cache_dir` and so on, as for `from_pretrained`.

    Example:

    ```python
    >>> from transformers_emo.subsets.loading.tokenizer_copy import Origin
    >>> Origin.of("model_cards/toy-emo", {}).is_folder
    True

    ```
    """

    place: str
    is_folder: bool
    hub_kwargs: dict[str, Any] = field(repr=False)

    @classmethod
    def of(cls, model: str | os.PathLike, hub_kwargs: Mapping[str, Any]) -> Origin:
        """The origin of what is being read from `model`."""
        hub = {name: value for name, value in hub_kwargs.items() if name != "force_download"}
        if is_hub_repo(model):
            return cls(os.fspath(model), False, hub)
        return cls(os.path.abspath(model), True, hub)

    @classmethod
    def of_loaded(cls, model: Any, hub_kwargs: Mapping[str, Any]) -> Origin | None:
        """The origin of a model that becomes a part of itself; `None` if it was not loaded from anywhere."""
        known, place = getattr(model, "_part_of", None), model.config.name_or_path
        if known is not None or not place:
            return known
        commit = getattr(model.config, "_commit_hash", None)
        if commit is None:  # a folder, even if it is gone
            return cls(os.path.abspath(place), True, {})
        return cls.of(place, {**hub_kwargs, "revision": commit})

    def __getstate__(self) -> dict[str, Any]:  # models are pickled and copied, and a token is a secret
        hub = {name: value for name, value in self.hub_kwargs.items() if name != "token"}
        return self.__dict__ | {"hub_kwargs": hub}

    def tokenizer_files(self) -> dict[str, str]:
        """The files of its tokenizer: from their names to where they are on this machine.

        Returns:
            `dict[str, str]`: empty if it has none.

        Raises:
            OSError: if it can no longer be read.
        """
        if self.is_folder and not os.path.isdir(self.place):
            raise FileNotFoundError(f"{self.place} is not there any more")
        hub = self.hub_kwargs
        try:
            names = side_files(self.place, TOKENIZER_FILES, **hub)
        except (OSError, httpx.HTTPError):  # the Hub cannot be reached: take the cache
            hub = hub | {"local_files_only": True}
            names = side_files(self.place, TOKENIZER_FILES, **hub)
        if not names and not self.is_folder and (hub.get("local_files_only") or is_offline_mode()):
            raise FileNotFoundError("the cache holds none, and the Hub cannot be asked")
        found = {name: optional_file(self.place, name, **hub) for name in names}
        return {name: path for name, path in found.items() if path is not None}


def copy_tokenizer(model: Any, folder: str | os.PathLike) -> None:
    """Copy the tokenizer to the folder where a part of a model is saved.

    The tokenizer is that of the model that the part was read from. Nothing happens if the model was loaded
    whole, if it saves only an adapter, or if the folder has a tokenizer. If the files cannot be read, a
    warning says so, and the model is saved without them.

    Args:
        model (`EmoPreTrainedModel`): the part.
        folder (`str` or `os.PathLike`): where it is saved.

    Example:

    ```python
    >>> from transformers_emo import EmoForCausalLM
    >>> model = EmoForCausalLM.from_pretrained("model_cards/toy-emo", expert_subset=[[0, 1, 31]] * 4)
    >>> model.save_pretrained(tmp_path)
    >>> (tmp_path / "tokenizer.json").is_file()
    True

    ```
    """
    origin, folder = _origin_of(model), Path(folder)
    if origin is None or not folder.is_dir() or side_files(folder, TOKENIZER_FILES):
        return
    try:
        for name, path in origin.tokenizer_files().items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            # Several processes may save to one folder: each file appears whole.
            partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
            shutil.copyfile(path, partial)
            partial.replace(target)
    except (OSError, httpx.HTTPError) as error:
        logger.warning_once(
            f"The tokenizer of {origin.place} could not be copied to {folder} ({error}): the model is saved "
            "without one. Save yours beside it, by `tokenizer.save_pretrained` or `tokenizer.push_to_hub`."
        )


def tokenizer_to_push(
    model: Any,
    folder: str | os.PathLike,
    repo_id: str,
    known_files: Mapping[str, float],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> dict[str, float]:
    """Have the tokenizer's files pushed with a model that is a part, unless the repository has some already.

    Args:
        model (`EmoPreTrainedModel`): the part.
        folder (`str` or `os.PathLike`): what is about to be pushed.
        repo_id (`str`): the repository, `user/name`; it exists.
        known_files (`Mapping[str, float]`): files that were in the folder before, which are pushed only if
            they have changed, with the times of their last change.
        revision (`str`, *optional*): the branch; it may not exist yet.
        token (`str` or `bool`, *optional*): as everywhere in huggingface_hub.

    Returns:
        `dict[str, float]`: `known_files`, with the tokenizer's files if they are not to be pushed.

    Example: see `EmoPreTrainedModel.push_to_hub`.
    """
    if _origin_of(model) is None:
        return dict(known_files)
    copy_tokenizer(model, folder)
    # Known by the first part of their path, which may be a folder of templates.
    ours = {PurePosixPath(name).parts[0] for name in side_files(folder, TOKENIZER_FILES)} - set(known_files)
    if not ours:
        return dict(known_files)
    api = HfApi(token=token)
    try:
        theirs = api.list_repo_files(repo_id, revision=revision)
    except RevisionNotFoundError:  # made by the push, from the main branch
        theirs = api.list_repo_files(repo_id)
    return dict(known_files) | (dict.fromkeys(ours, inf) if matching(theirs, TOKENIZER_FILES) else {})


def _origin_of(model: Any) -> Origin | None:
    """What the model is a part of, if it is and saves more than an adapter."""
    if getattr(model, "_hf_peft_config_loaded", False):
        return None
    return getattr(model, "_part_of", None)


class SubsetName(str):
    """The folder or repository of a model, with the experts of a part of it; otherwise a string like any.

    `from_pretrained(name)` loads these experts. `str(name)` is the plain name, which loads them all.

    Args:
        place (`str`): the folder or Hub repository.

    Example:

    ```python
    >>> from transformers_emo import EmoForCausalLM
    >>> part = EmoForCausalLM.from_pretrained("model_cards/toy-emo", expert_subset=[[0, 1, 2, 31]] * 4)
    >>> part.config.name_or_path
    'model_cards/toy-emo'
    >>> EmoForCausalLM.from_pretrained(part.config.name_or_path).config.num_experts
    4
    >>> EmoForCausalLM.from_pretrained(str(part.config.name_or_path)).config.num_experts
    32

    ```
    """

    expert_subset: ExpertSubset
    origin: Origin
    by_run: bool = False  # the experts are those that `emo run` was asked for

    @classmethod
    def of(cls, place: str | os.PathLike, subset: ExpertSubset, hub_kwargs: Mapping[str, Any]) -> Self:
        """The name of a part.

        Args:
            place (`str` or `os.PathLike`): the folder or Hub repository of the model.
            subset (`ExpertSubset`): the experts.
            hub_kwargs (`Mapping[str, Any]`): `revision`, `token`, `cache_dir` and so on, to load it again.
        """
        name = cls(os.fspath(place))
        name.expert_subset, name.origin = subset, Origin.of(place, hub_kwargs)
        return name


def name_part(model: Any, place: str | os.PathLike, hub_kwargs: Mapping[str, Any]) -> None:
    """Let the config of a model say where it is from, and if it is a part, which part.

    Args:
        model (`EmoPreTrainedModel`): the model.
        place (`str` or `os.PathLike`): the folder or Hub repository.
        hub_kwargs (`Mapping[str, Any]`): `revision`, `token`, `cache_dir` and so on, to load it again.

    Example: see `SubsetName`.
    """
    name: str = os.fspath(place)
    if model.config.retained_experts is not None:
        held = held_experts(model.config)
        object.__setattr__(held, "drop_shared", True)  # whatever the part leaves out, it is meant
        name = SubsetName.of(place, held, hub_kwargs)
    model.config._name_or_path = name  # `name_or_path = ...` would make it a plain string


def _as_string(dumper: Any, name: SubsetName) -> Any:
    return dumper.represent_str(str(name))


for _representer in (yaml.representer.SafeRepresenter, yaml.representer.Representer):
    _representer.add_representer(SubsetName, _as_string)  # model cards name their base model
