"""The folder or repository of a model, opened once and passed on.

Everything that reads part of a model begins alike: one commit, the config, no quantised weights, the library
of subsets, the choice of experts, the headers of the weights, a warning if the choice was made on another
model.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import torch

from ...checkpoints.checkpoint import Checkpoint
from ...checkpoints.hub.names import HUB_KWARGS, is_hub_repo, pinned
from ...checkpoints.hub.opening import fetch_ahead, open_part
from ...checkpoints.hub.repository import HubFiles
from ...checkpoints.lazy_tensor import LazyTensor
from ...checkpoints.local_files import check_json_inside
from ...checkpoints.side_files import GENERATION_CONFIG, identity_of, optional_file
from ...configuration import EmoConfig
from ...quantization.packed_config import PackedConfig, packing_of, refuse_quantised
from ...quantization.packed_files import PackedCheckpoint
from ..exclusion import named_exclusion, remaining_subset
from ..expert_subset import ExpertSubset
from ..fingerprint import attention_of, warn_if_chosen_elsewhere
from ..library import Fetch, library_of
from ..reduced_config import local_experts, subset_config
from .wanted_tensors import is_wanted, lazy_parameters
from .weights_check import check_sizes


@dataclass(frozen=True)
class KeptExperts:
    """Experts to keep of a model, known to fit it.

    Args:
        subset (`ExpertSubset`): the experts, in the numbering of the root model.
        local (`list[list[int] | None]`): the same in the model's own numbering, `None` for a dense layer.
        excluded: the experts that the caller left out, as `named_exclusion` gives them; `None` for none.

    Example: see `ModelSource`.
    """

    subset: ExpertSubset
    local: list[list[int] | None]
    excluded: Any = None


class ModelSource:
    """A model's folder or repository: its config, commit, library, weights and warnings.

    Headers are read once, by the first call that needs them; close the source, or use it in a `with` block.

    Args:
        path (`str` or `os.PathLike`): the folder or Hub repository; empty for a model from nowhere.
        config (`EmoConfig`): the model's config.
        hub_kwargs (`Mapping[str, Any]`, *optional*): `revision`, `token`, `cache_dir` and so on, as for
            `from_pretrained`.
        variant (`str`, *optional*): as in `from_pretrained`.

    Example:

    ```python
    >>> from transformers_emo.subsets.loading.model_source import ModelSource
    >>> with ModelSource.open("model_cards/toy-emo") as source:
    ...     kept = source.keep([[0, 1, 2, 31]] * 4)
    ...     tensors = source.parameters(kept.local)
    >>> tensors["model.layers.0.mlp.gate.weight"].shape
    (4, 128)

    ```
    """

    def __init__(
        self,
        path: str | os.PathLike,
        config: EmoConfig,
        hub_kwargs: Mapping[str, Any] | None = None,
        *,
        variant: str | None = None,
    ):
        self.path = path
        self.config = config
        self.hub_kwargs = dict(hub_kwargs or {})
        self.variant = variant
        self._checkpoint: Checkpoint | None = None
        self._opened_for: list[list[int] | None] | None = None
        self._sizes_checked = self._any_size = False

    @classmethod
    def open(cls, path: str | os.PathLike, **hub_kwargs: Any) -> Self:
        """The source of a model whose experts can be taken apart, at one commit.

        Args:
            path (`str` or `os.PathLike`): the folder or Hub repository.
            hub_kwargs: `revision`, `token`, `cache_dir` and so on, as for `from_pretrained`.

        Raises:
            OSError: if there is neither such a folder nor such a repository.
            CheckpointError: if the weights are quantised in a way that is not read; see `packing_of`.
        """
        hub_kwargs = pinned(path, hub_kwargs)
        source = cls(path, EmoConfig.from_pretrained(path, **hub_kwargs), hub_kwargs)
        _ = source.packing
        return source

    @classmethod
    def of_loaded(cls, config: EmoConfig, hub_kwargs: Mapping[str, Any] | None = None) -> Self:
        """The source that a model was loaded from, at the commit that was loaded.

        Args:
            config (`EmoConfig`): the model's config.
            hub_kwargs (`Mapping[str, Any]`, *optional*): what the caller says of where to download from.
        """
        commit = getattr(config, "_commit_hash", None)
        revision = {} if commit is None else {"revision": commit}
        return cls(config.name_or_path or "", config, revision | dict(hub_kwargs or {}))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files of the weights; they are opened again when needed."""
        if self._checkpoint is not None:
            self._checkpoint.source.close()

    @property
    def packing(self) -> PackedConfig | None:
        """`PackedConfig`, *optional*: how weights are packed; `CheckpointError` if otherwise quantised."""
        return packing_of(self.config, os.fspath(self.path))

    def refuse_quantised(self) -> None:
        """Raise `CheckpointError` if the weights are quantised, for what needs them as they are."""
        refuse_quantised(self.config, os.fspath(self.path))

    @property
    def commit(self) -> str | None:
        """`str`, *optional*: the commit of a repository."""
        return self.hub_kwargs.get("revision")

    @cached_property
    def library(self) -> tuple[Path | None, Fetch | None]:
        """The `folder` and the `fetch` that `find_subset` takes."""
        return library_of(self.path, **self.hub_kwargs)

    def named_exclusion(self, exclude_experts: Any) -> Any:
        """The experts never to use, read where they go by a name; see `exclusion.named_exclusion`."""
        return named_exclusion(exclude_experts, *self.library)

    def keep(self, expert_subset: Any, exclude_experts: Any = None) -> KeptExperts:
        """The experts that a caller asks for.

        Args:
            expert_subset: whatever `ExpertSubset.of` takes, or `None` for all experts.
            exclude_experts: whatever `remaining_subset` takes, or `None` for none.

        Raises:
            SubsetError: if either does not fit the model.
        """
        excluded = self.named_exclusion(exclude_experts)
        subset = remaining_subset(expert_subset, excluded, self.config, *self.library)
        return KeptExperts(subset, local_experts(subset, self.config), excluded)

    def config_of(self, kept: KeptExperts) -> EmoConfig:
        """The config of the model with these experts."""
        return subset_config(self.config, kept.subset)

    def checkpoint(self, kept: list[list[int] | None] | None = None) -> Checkpoint:
        """The weights, known by their headers, which are read once.

        Args:
            kept (`list[list[int] | None]`, *optional*): for each layer the experts that will be read, in the
                model's own numbering. Files of a repository that hold nothing else are downloaded whole;
                without `kept` none are, unless there are very many (expert shards).

        Raises:
            CheckpointError: if there are no safetensors weights, or they are damaged.
        """
        if self._checkpoint is None:
            self._opened_for = kept
            if is_hub_repo(self.path):
                wants = None if kept is None else partial(is_wanted, kept)
                found = optional_file(self.path, "config.json", **self.hub_kwargs)
                if found is not None:
                    check_json_inside(*os.path.split(found))
                files = HubFiles(os.fspath(self.path), self.hub_kwargs)
                self._checkpoint = open_part(files, wants, variant=self.variant)
            else:
                folder = Path(self.path, self.hub_kwargs.get("subfolder") or "")
                for name in ("config.json", GENERATION_CONFIG):
                    check_json_inside(folder, name)
                self._checkpoint = Checkpoint.from_folder(folder, variant=self.variant)
            if (packing := self.packing) is not None:
                self._checkpoint = PackedCheckpoint(self._checkpoint, packing)
        assert self._opened_for in (None, kept), "a repository is opened for the experts that are read"
        return self._checkpoint

    def check_sizes(self, *, ignore_missing: bool = False, ignore_mismatched: bool = False) -> None:
        """Check that the config asks for no more than the weights hold: `CheckpointError` if it does.

        Nothing happens for a repository: of its files only those are opened that will be read.

        Args:
            ignore_missing (`bool`, defaults to `False`): the config may ask for more layers.
            ignore_mismatched (`bool`, defaults to `False`): it may ask for any sizes.
        """
        self._any_size = ignore_mismatched
        if not is_hub_repo(self.path):
            tensors = self.checkpoint().tensors  # read here in any case: damage comes before a misfit
            if not ignore_mismatched:
                check_sizes(tensors, self.config, ignore_missing=ignore_missing)
            self._sizes_checked = True

    def parameters(self, kept: list[list[int] | None] | None = None) -> dict[str, LazyTensor]:
        """The parameters of the network, each made of the bytes of the kept experts; see `lazy_parameters`.

        Args:
            kept (`list[list[int] | None]`, *optional*): as in `checkpoint`; all experts by default.

        Raises:
            CheckpointError: if the weights and the config differ.
        """
        checkpoint = self.checkpoint(kept)
        checked, any_size = self._sizes_checked, self._any_size
        return lazy_parameters(checkpoint, self.config, kept, sizes_checked=checked, any_size=any_size)

    def fetch(self, tensors: Iterable[LazyTensor], *, progress: bool = False) -> None:
        """Have the bytes of tensors fetched all at once, where they are on the Hub; see `fetch_ahead`."""
        fetch_ahead(self.checkpoint(self._opened_for).source, tensors, progress=progress)

    def attention(self) -> dict[str, LazyTensor]:
        """The tensors that fingerprints are made of; see `attention_of`."""
        return attention_of(self.checkpoint(self._opened_for))

    def identity(self) -> dict[str, Any]:
        """What the model is recognised by; see `identity_of`."""
        return identity_of(self.path, self.checkpoint(self._opened_for), **self.hub_kwargs)

    def warn_if_chosen_elsewhere(
        self, kept: KeptExperts, tensors: Mapping[str, torch.Tensor | LazyTensor]
    ) -> None:
        """Warn if the experts were chosen on another model; see `fingerprint.warn_if_chosen_elsewhere`.

        Args:
            kept (`KeptExperts`): the experts.
            tensors (`Mapping[str, torch.Tensor | LazyTensor]`): the model's, by name.
        """
        warn_if_chosen_elsewhere(
            kept.subset, self.path, tensors, self.config.num_hidden_layers, excluded=kept.excluded
        )


def check_hub_kwargs(caller: str, hub_kwargs: Mapping[str, Any]) -> None:
    """Check that keyword arguments say where to download from, and nothing else.

    Args:
        caller (`str`): the function that they were given to.
        hub_kwargs (`Mapping[str, Any]`): the keyword arguments.

    Raises:
        TypeError: as Python does, if one is unknown.

    Example:

    ```python
    >>> from transformers_emo.subsets.loading.model_source import check_hub_kwargs
    >>> check_hub_kwargs("swap_experts", {"revision": "main"})

    ```
    """
    unknown = sorted(set(hub_kwargs) - set(HUB_KWARGS))
    if unknown:
        raise TypeError(
            f"{caller}() got an unexpected keyword argument {unknown[0]!r}: expected one of its own, or of "
            f"{', '.join(HUB_KWARGS)}."
        )
