"""The model that experts are chosen of: opened, and given to the choice layer by layer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ...checkpoints.errors import CheckpointError
from ...checkpoints.hub.names import folder_or_repo, is_hub_repo, pinned
from ...configuration import LEGACY_MODEL_TYPE, EmoConfig
from ...modeling_emo import EmoPreTrainedModel
from ..exclusion import excluded_experts
from ..expert_subset import ExpertSubset
from ..fingerprint import fingerprint_of, warn_if_chosen_elsewhere
from ..loading.model_source import ModelSource
from .calibration import tokenizer_of
from .choice import masked_experts
from .layer_sources import CheckpointLayers, Layers, LoadedLayers


@dataclass(frozen=True)
class OpenedModel:
    """A loaded model, or a folder or repository whose config has been read.

    Args:
        source (`ModelSource`): the folder or repository.
        model (`EmoPreTrainedModel`, *optional*): the loaded model.

    Example: see `open_model`.
    """

    source: ModelSource
    model: EmoPreTrainedModel | None = None

    @property
    def config(self) -> EmoConfig:
        """Its config."""
        return self.source.config

    @property
    def place(self) -> str | None:
        """The folder or repository that it is from, if it is known."""
        return os.fspath(self.source.path) or None

    def find_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer beside the model. Raises `ValueError` if there is none."""
        return tokenizer_of(self.place, **self.source.hub_kwargs)

    def excluded(self, exclude_experts: Any, *, reads_weights: bool) -> list[set[int]]:
        """The experts of each layer that are never to be chosen, in root numbering.

        Warns if they are a subset that was chosen on another model.

        Args:
            exclude_experts: as for `select_experts`.
            reads_weights (`bool`): whether the choice will read the model's weights. If not, nothing of a
                repository is fetched to compare them.

        Raises:
            SubsetError: if there is no such subset, or it does not fit the model.
        """
        never: list[set[int]] = [set()] * self.config.num_hidden_layers
        if exclude_experts is not None:
            exclude_experts = self.source.named_exclusion(exclude_experts)
            never = excluded_experts(exclude_experts, self.config)
            if isinstance(exclude_experts, ExpertSubset):
                self._warn_if_chosen_elsewhere(exclude_experts, reads_weights)
        if self.model is not None:
            masked = masked_experts(self.model)
            never = [here | there for here, there in zip(never, masked, strict=True)]
        return never

    @contextmanager
    def layers(
        self, token_ids: torch.Tensor, dtype: torch.dtype | None, device: str | torch.device | None
    ) -> Iterator[Layers]:
        """The model's layers, while they are needed.

        A loaded model is in evaluation mode meanwhile. The files of a checkpoint are closed at the end.

        Args:
            token_ids (`torch.Tensor`): the token ids that will be embedded.
            dtype (`torch.dtype`, *optional*): for a checkpoint: what to run in.
            device (`str` or `torch.device`, *optional*): for a checkpoint: where to run.

        Raises:
            CheckpointError: if the checkpoint is incomplete or damaged.
        """
        if self.model is not None:
            training = self.model.training
            self.model.eval()
            try:
                yield LoadedLayers(self.model)
            finally:
                self.model.train(training)
            return
        with self.source:
            yield CheckpointLayers(
                self.source.checkpoint(), self.config, token_ids, dtype=dtype, device=device or "cpu"
            )

    def fingerprint(self) -> str | None:
        """What the weights are recognised by, for a choice that does not run the model.

        `None` for a repository: nothing is fetched for it.
        """
        num_layers = self.config.num_hidden_layers
        if self.model is not None:
            return fingerprint_of(self.model.state_dict(), num_layers)
        if is_hub_repo(self.source.path):
            return None
        with suppress(CheckpointError), self.source:  # a choice at random needs no weights
            return fingerprint_of(self.source.attention(), num_layers)
        return None

    def _warn_if_chosen_elsewhere(self, excluded: ExpertSubset, reads_weights: bool) -> None:
        tensors: dict[str, Any] = {}
        if self.model is not None:
            tensors = dict(self.model.named_parameters())
        elif excluded.fingerprint is not None and (reads_weights or not is_hub_repo(self.source.path)):
            # A choice at random needs no weights. For any other the same error comes when it reads them.
            with suppress(CheckpointError):
                tensors.update(self.source.attention())
        try:
            layers = self.config.num_hidden_layers
            warn_if_chosen_elsewhere(None, self.place or "", tensors, layers, excluded=excluded)
        finally:
            self.source.close()


def open_model(
    model: EmoPreTrainedModel | str | os.PathLike,
    dtype: torch.dtype | None,
    device: str | torch.device | None,
    hub_kwargs: dict[str, Any],
) -> OpenedModel:
    """Read the config of a model, and settle on one commit of a repository.

    Args:
        model (`EmoPreTrainedModel`, `str` or `os.PathLike`): the model, or its folder or repository.
        dtype (`torch.dtype`, *optional*): what a folder or repository shall run in.
        device (`str` or `torch.device`, *optional*): where it shall run.
        hub_kwargs (`dict[str, Any]`): how to reach the repository.

    Raises:
        ValueError: if this is no EMO model, there is no such device, or a loaded model comes with arguments
            for folders and repositories.
        CheckpointError: if a folder has no config, or the weights are quantised.
        OSError: if there is no such folder or repository.

    Example:

    ```python
    >>> from transformers_emo.subsets.choosing.model_opening import open_model
    >>> open_model("model_cards/toy-emo", None, None, {}).config.num_experts
    32

    ```
    """
    if isinstance(model, EmoPreTrainedModel):
        if dtype is not None or device is not None or hub_kwargs:
            raise ValueError(
                f"The model is loaded, in {model.dtype} on {model.device}: `dtype`, `device` and where to "
                "download from are for folders and repositories. Leave them out."
            )
        return OpenedModel(ModelSource.of_loaded(model.config), model)
    if not isinstance(model, str | os.PathLike):
        raise ValueError(
            f"Cannot choose experts of {type(model).__name__}: give an EMO model (the one inside a wrapper), "
            "a folder or a Hub repository."
        )
    _check_device(device)
    _check_kind(model, hub_kwargs)
    hub_kwargs = pinned(model, hub_kwargs)
    source = ModelSource(model, EmoConfig.from_pretrained(model, **hub_kwargs), hub_kwargs)
    source.refuse_quantised()
    return OpenedModel(source)


def _check_device(device: str | torch.device | None) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # no such device, or PyTorch was built without it
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"Cannot run on the device {device!r}: {reason}. Name one that this machine has, such as 'cpu'."
        ) from error


def _check_kind(model: str | os.PathLike, hub_kwargs: dict[str, Any]) -> None:
    """Check that a folder or repository has the config of an EMO model."""
    path = os.fspath(model)
    if os.path.isdir(model) and not os.path.isfile(
        os.path.join(model, hub_kwargs.get("subfolder") or "", "config.json")
    ):
        raise CheckpointError(
            f"There is no config.json in {path}: it is no model's folder. Name a folder that "
            "`save_pretrained` wrote, or a Hub repository."
        )
    with folder_or_repo(model):
        found = EmoConfig.get_config_dict(model, **hub_kwargs)[0].get("model_type")
    if found not in (EmoConfig.model_type, LEGACY_MODEL_TYPE):
        raise ValueError(
            f"{path} is a model of type {found!r}, expected {EmoConfig.model_type!r}: name an EMO model."
        )
