"""`ExpertSubset`: the experts that are kept in each layer, as data."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..checkpoints.small_files import read_json
from ..checkpoints.writing.durable_files import write_whole
from ..configuration import EmoConfig
from . import set_operations
from .library import Fetch, subset_file
from .numbering import present_experts, protected_experts, root_experts
from .push_subset import push_subset
from .ranking import best_experts, sizes_by_mass
from .validation import SubsetError, as_layers, check_scores, checked_ids, is_id

_FORMAT = "emo-expert-subset"
_VERSION = 1
# The authors' names of methods and ours, where they differ.
AUTHORS_METHODS = {"greedy_layerwise": "layerwise"}


@dataclass(frozen=True)
class ExpertSubset:
    """The experts kept in each layer of a model, in the numbering of the root model.

    The root model is the full one that a chain of subsets began with, so that ids mean the same in a subset,
    a subset of that subset and the full model.

    Args:
        experts (`Sequence[Sequence[int] | None]`): for each layer the ids kept, shared ones included; sorted
            here. `None` for a dense layer.
        scores (`Sequence[Sequence[float | None] | None]`, *optional*): for each layer a score for every
            expert of the root model, `None` for one that was not there to be scored.
        always_kept (`Sequence[Sequence[int] | None]`, *optional*): for each layer the shared and
            always-active experts, which no choice by score leaves out.
        root_experts_per_layer (`Sequence[int]`, *optional*): the number of experts in each layer of the root
            model, 0 for a dense one. A model with other numbers refuses the subset.
        method (`str`, *optional*): how the experts were chosen.
        num_tokens (`int`, *optional*): the number of calibration tokens.
        num_texts (`int`, *optional*): the number of calibration texts.
        settling (`list[dict]`, *optional*): how the choice settled with more text. Each step has its
            `num_texts`, its `num_tokens` and the `jaccard` index of its choice with the one before.
        source (`str`, *optional*): folder or Hub repository of the model they were chosen on.
        revision (`str`, *optional*): its revision.
        fingerprint (`str`, *optional*): recognises that model under any name; its format is described in
            `transformers_emo.subsets.fingerprint`. Files of earlier versions have none.
        drop_shared (`bool`, defaults to `False`): allow the subset to leave out shared or always-active
            experts.
        local_ids (`bool`, defaults to `False`): the ids are in the numbering of the model the subset is
            applied to, and not of the root (the authors' `pruning_metadata.json`).

    Raises:
        SubsetError: if ids are negative, not integers or named twice, or scores are not finite numbers or do
            not reach to every expert kept.

    Example:

    ```python
    >>> from transformers_emo import ExpertSubset
    >>> ExpertSubset([[7, 2, 31], None]).experts
    [[2, 7, 31], None]

    ```
    """

    experts: list[list[int] | None]
    scores: list[list[float | None] | None] | None = None
    always_kept: list[list[int] | None] | None = None
    root_experts_per_layer: list[int] | None = None
    method: str | None = None
    num_tokens: int | None = None
    num_texts: int | None = None
    settling: list[dict[str, float]] | None = None
    source: str | None = None
    revision: str | None = None
    fingerprint: str | None = None
    drop_shared: bool = False
    local_ids: bool = False

    def __post_init__(self):
        object.__setattr__(self, "experts", checked_ids(self.experts))
        for name, expected, fits in (
            ("scores", "one list a layer", lambda v: isinstance(v, list) and len(v) == len(self.experts)),
            (
                "always_kept",
                "one list a layer",
                lambda v: isinstance(v, list) and len(v) == len(self.experts),
            ),
            (
                "root_experts_per_layer",
                "one number a layer",
                lambda v: isinstance(v, list) and all(map(is_id, v)),
            ),
            ("num_tokens", "a number", is_id),
            ("num_texts", "a number", is_id),
            ("settling", "a list", lambda v: isinstance(v, list)),
            ("method", "a name", lambda v: isinstance(v, str)),
            ("source", "a name", lambda v: isinstance(v, str)),
            ("revision", "a name", lambda v: isinstance(v, str)),
            ("fingerprint", "a text", lambda v: isinstance(v, str)),
        ):
            value = getattr(self, name)
            if value is not None and not fits(value):
                raise SubsetError(f"`{name}` is {value!r}, expected {expected}.")
        if self.always_kept is not None:
            object.__setattr__(self, "always_kept", checked_ids(self.always_kept))
        if self.scores is not None:
            check_scores(self.scores, self.experts, self.always_kept or [None] * len(self.experts))
        for name in ("drop_shared", "local_ids"):
            if not isinstance(getattr(self, name), bool):
                raise SubsetError(f"`{name}` is {getattr(self, name)!r}, expected true or false.")

    def save(self, path: str | os.PathLike) -> None:
        """Write the subset as JSON. The file appears only when it is complete.

        Args:
            path (`str` or `os.PathLike`): the file.

        Example:

        ```python
        >>> from transformers_emo import ExpertSubset
        >>> ExpertSubset([[0, 1, 31]]).save(tmp_path / "math.json")
        >>> ExpertSubset.load(tmp_path / "math.json").experts
        [[0, 1, 31]]

        ```
        """
        write_whole(path, json.dumps(self.to_dict()) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> ExpertSubset:
        """Read a subset saved by `save`, or the authors' `pruning_metadata.json`.

        Args:
            path (`str` or `os.PathLike`): the file.

        Raises:
            SubsetError: if the file is missing or is not such a file.

        Example: see `save`.
        """
        try:
            data = read_json(path)
        except OSError as error:
            raise SubsetError(
                f"Cannot read the expert subset {os.fspath(path)!r}: {error.strerror or error}."
            ) from error
        except ValueError as error:  # not JSON, too long, too deep, or a key is there twice
            raise SubsetError(
                f"{os.fspath(path)!r} is not an expert subset: it does not hold JSON ({error})."
            ) from error
        try:
            return cls.from_dict(data)
        except SubsetError as error:
            raise SubsetError(f"{os.fspath(path)!r}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """`dict[str, Any]`: the subset as JSON data; see `from_dict`."""
        data = {"format": _FORMAT, "version": _VERSION, "experts": self.experts}
        optional = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "experts"}
        return data | {
            name: value for name, value in optional.items() if value is not None and value is not False
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ExpertSubset:
        """Build a subset from JSON data.

        Args:
            data (`dict[str, Any]`): what `to_dict` gives, at the least `{"experts": [...]}`; or the contents
                of the authors' `pruning_metadata.json`, whose ids are in the numbering of the model that was
                pruned.

        Raises:
            SubsetError: if it is neither.

        Example:

        ```python
        >>> from transformers_emo import ExpertSubset
        >>> ExpertSubset.from_dict({"experts_kept_per_layer": [[0, 5, 15]], "prune_keep_k": 3}).local_ids
        True

        ```
        """
        if not isinstance(data, dict):
            raise SubsetError(f"Expected an object with the key 'experts', got {type(data).__name__}.")
        if "experts_kept_per_layer" in data:
            # The authors write no ids (or an empty list) for dense layers.
            experts = [ids or None for ids in as_layers(data["experts_kept_per_layer"])]
            method = data.get("pruning_method")
            method = AUTHORS_METHODS.get(method, method) if isinstance(method, str) else method
            return cls(experts, method=method, source=data.get("original_model"), local_ids=True)
        if "experts" not in data:
            raise SubsetError(
                "Found neither 'experts' nor 'experts_kept_per_layer' among the keys "
                f"{sorted(map(str, data))[:10]}."
            )
        if data.get("format", _FORMAT) != _FORMAT or data.get("version", _VERSION) != _VERSION:
            raise SubsetError(
                f"Expected the format {_FORMAT!r}, version {_VERSION}, got {data.get('format')!r}, version "
                f"{data.get('version')!r}: a newer transformers-emo may read it."
            )
        unknown = set(data) - set(cls.__dataclass_fields__) - {"format", "version"}
        if unknown:
            raise SubsetError(
                f"Unknown keys {sorted(unknown)}, expected some of {sorted(cls.__dataclass_fields__)}."
            )
        return cls(**{name: data[name] for name in cls.__dataclass_fields__ if name in data})

    @classmethod
    def of(
        cls,
        value: ExpertSubset | str | os.PathLike | dict | Sequence,
        folder: str | os.PathLike | None = None,
        fetch: Fetch | None = None,
    ) -> ExpertSubset:
        """Make a subset from anything that describes one.

        Args:
            value (`ExpertSubset`, path, `dict` or list of lists): a subset, a JSON file, JSON data or the ids
                themselves.
            folder (`str` or `os.PathLike`, *optional*): a model's folder, whose `subsets/<name>.json` can be
                given by `<name>`.
            fetch (`Callable`, *optional*): gets a file of the model's Hub repository; see `find_subset`.

        Raises:
            SubsetError: if it describes none.

        Example:

        ```python
        >>> from transformers_emo import ExpertSubset
        >>> ExpertSubset.of([[0, 31], [2, 31]]).experts
        [[0, 31], [2, 31]]

        ```
        """
        if isinstance(value, ExpertSubset):
            return value
        if isinstance(value, dict):
            return cls.from_dict(value)
        if isinstance(value, str | os.PathLike):
            return cls.load(subset_file(value, folder, fetch))
        if isinstance(value, Sequence) or hasattr(value, "tolist"):
            return cls(as_layers(value))
        raise SubsetError(
            f"Cannot read an expert subset from {type(value).__name__}: give an ExpertSubset, a path, a dict "
            "or a list with one list of ids a layer."
        )

    def push_to_hub(self, repo_id: str, name: str, **kwargs: Any) -> Any:
        """Put the subset into a model's repository, where `expert_subset=name` finds it.

        Args:
            repo_id (`str`): the repository, `user/name`; made if need be.
            name (`str`): its name there; the file is `subsets/<name>.json`.
            kwargs: `token`, `revision`, `private` and `commit_message`, as for models.

        Returns:
            `CommitInfo`: the commit.

        Raises:
            SubsetError: if the name cannot be one.

        Example:

        ```python
        >>> from transformers_emo import ExpertSubset
        >>> ExpertSubset([[0, 1, 31]]).push_to_hub("me/emo", "math", token="hf_...")  # doctest: +SKIP

        ```
        """
        return push_subset(self.to_dict(), repo_id, name, **kwargs)

    def for_model(self, config: EmoConfig) -> ExpertSubset:
        """The same subset in root numbering, checked to fit a model.

        The result knows which experts are always kept.

        Args:
            config (`EmoConfig`): the model's config, full or of a subset itself.

        Raises:
            SubsetError: if the layers do not match, an id is out of range or not in the model, a layer is
                left without routed experts, a shared or always-active expert is dropped without
                `drop_shared`, or the subset was made for a model of another size.

        Example:

        ```python
        >>> from transformers_emo import EmoConfig, ExpertSubset
        >>> config = EmoConfig(num_hidden_layers=1, num_experts=8, num_experts_per_tok=4)
        >>> ExpertSubset([[1, 2, 7]]).for_model(config).root_experts_per_layer
        [8]

        ```
        """
        layers = config.layer_experts
        if len(self.experts) != len(layers):
            raise SubsetError(
                f"The subset has {len(self.experts)} layers, the model {len(layers)}: it was made for "
                "another model."
            )
        root_sizes = root_experts(config)
        if self.root_experts_per_layer is not None and list(self.root_experts_per_layer) != root_sizes:
            raise SubsetError(
                f"The subset was made for another model: one with {self.root_experts_per_layer} experts in "
                f"its layers, and this one has {root_sizes}."
            )
        present, protected = present_experts(config), protected_experts(config)
        experts = [
            self._fit_layer(index, ids, layer, present[index], protected[index] or [], root_sizes[index])
            for index, (ids, layer) in enumerate(zip(self.experts, layers, strict=True))
        ]
        always = self.always_kept if self.drop_shared else self.always_kept or protected
        return replace(
            self,
            experts=experts,
            always_kept=always,
            root_experts_per_layer=root_sizes,
            local_ids=False,
        )

    def top(self, num_experts: int, *, budget: str = "uniform", least: int = 1) -> ExpertSubset:
        """Another choice by the same scores: the experts with the largest, ties to the smaller id.

        For scores of the full model (`"global"`, `"easy_ep"`, `"reap"`, `"random"`) this is what
        `select_experts` would choose anew. Scores of `"layerwise"` were measured with as many experts as were
        chosen then, and are only close to those of another number.

        Args:
            num_experts (`int`): experts to keep in each layer, shared ones included.
            budget (`str`, defaults to `"uniform"`): `"uniform"`, so many in every layer; or `"mass"`, so many
                in the mean over layers, where their shares of the layer's score are largest.
            least (`int`, defaults to 1): for `"mass"`, how many every layer keeps beside shared and
                always-active experts.

        Raises:
            SubsetError: if the subset has no scores, or a layer not enough experts.

        Example:

        ```python
        >>> from transformers_emo import select_experts
        >>> toy, text = "model_cards/toy-emo", ["import os"]
        >>> subset = select_experts(toy, text, 16, method="global", progress=False)
        >>> subset.top(8) == select_experts(toy, text, 8, method="global", progress=False)
        True

        ```
        """
        if self.scores is None or self.always_kept is None:
            raise SubsetError("The subset has no scores to choose by: choose with `select_experts`.")
        if not is_id(num_experts):
            raise SubsetError(f"`num_experts` is {num_experts!r}, expected an integer.")
        if budget not in ("uniform", "mass"):
            raise SubsetError(f"Unknown budget {budget!r}, expected 'uniform' or 'mass'.")
        for index, (scores, always) in enumerate(zip(self.scores, self.always_kept, strict=True)):
            if scores is None or always is None:
                continue
            scored = sum(score is not None for score in scores)
            if not len(always) < num_experts <= scored:
                raise SubsetError(
                    f"Cannot keep {num_experts} experts in layer {index}: it has scores of {scored}, of "
                    f"which {len(always)} are always kept; expected {len(always) + 1} to {scored}."
                )
        sizes = [num_experts] * len(self.experts)
        if budget == "mass":
            sizes = sizes_by_mass(self.scores, self.always_kept, num_experts, least)
        experts = [
            None if scores is None else best_experts(scores, always or (), size)
            for scores, always, size in zip(self.scores, self.always_kept, sizes, strict=True)
        ]
        return replace(self, experts=experts)

    def __or__(self, other: ExpertSubset) -> ExpertSubset:
        if not isinstance(other, ExpertSubset):
            return NotImplemented
        return ExpertSubset(**set_operations.union([self, other]))

    def __and__(self, other: ExpertSubset) -> ExpertSubset:
        if not isinstance(other, ExpertSubset):
            return NotImplemented
        return ExpertSubset(**set_operations.intersection([self, other]))

    def __sub__(self, other: ExpertSubset) -> ExpertSubset:
        if not isinstance(other, ExpertSubset):
            return NotImplemented
        return ExpertSubset(**set_operations.difference(self, other))

    def _fit_layer(self, index, ids, layer, present, protected, root_size) -> list[int] | None:
        """The root ids of one layer, checked.

        `present` are the root ids of the experts that the model holds there, `protected` of those that every
        token uses.
        """
        if layer.is_dense or ids is None:
            if layer.is_dense and not ids:
                return None
            kind = "dense: give None for it" if layer.is_dense else "not dense: give the ids to keep"
            raise SubsetError(f"Layer {index} of the model is {kind} (the subset has {ids}).")
        limit = layer.num_experts if self.local_ids else root_size
        outside = [e for e in ids if e >= limit]
        if outside:
            raise SubsetError(
                f"Layer {index} has no expert {outside[0]}: expected ids from 0 to {limit - 1}."
            )
        if self.local_ids:
            ids = [present[e] for e in ids]
        missing = sorted(set(ids) - set(present))
        if missing:
            raise SubsetError(
                f"Expert {missing[0]} of layer {index} is not in this model, which is itself a subset "
                f"holding {present}: choose among those or load from the full model."
            )
        dropped = sorted(set(protected) - set(ids))
        if dropped and not self.drop_shared:
            raise SubsetError(
                f"The subset drops expert {dropped[0]} of layer {index}, which every token uses (shared or "
                f"always active): add {dropped} to the layer, or set drop_shared=True if it is meant."
            )
        if not set(ids) - set(protected):
            raise SubsetError(
                f"The subset keeps no routed expert in layer {index} (it keeps {ids}): keep at least one."
            )
        return ids
