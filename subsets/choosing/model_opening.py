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
from ...checkpoints.hub.names import folder_or_repo, pinned
from ...configuration import LEGACY_MODEL_TYPE, EmoConfig
from ...modeling_emo import EmoPreTrainedModel
from ..exclusion import excluded_experts, named_exclusion
from ..expert_subset import ExpertSubset
from ..fingerprint import (
    attention_of,
    fingerprint_of,
    fingerprint_of_folder,
    warn_if_chosen_elsewhere,
)
from ..library import library_of
from ..loading.wanted_tensors import open_checkpoint
from .calibration import tokenizer_of
from .choice import masked_experts
from .layer_sources import CheckpointLayers, Layers, LoadedLayers


@dataclass(frozen=True)
class OpenedModel:
    """A loaded model, or a folder or repository whose config has been read.

    Args:
        model (`EmoPreTrainedModel`, `str` or `os.PathLike`): the model, the folder or the repository.
        config (`EmoConfig`): its config.
        source (`str`, *optional*): the folder or repository that it is from, if it is known.
        hub_kwargs (`dict[str, Any]`): how to reach the repository, with its commit as `revision`.

    Example: see `open_model`.
    """

    model: EmoPreTrainedModel | str | os.PathLike
    config: EmoConfig
    source: str | None
    hub_kwargs: dict[str, Any]

    def find_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer beside the model. Raises `ValueError` if there is none."""
        return tokenizer_of(self.source, **self.hub_kwargs)

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
            exclude_experts = named_exclusion(exclude_experts, *library_of(self.source, **self.hub_kwargs))
            never = excluded_experts(exclude_experts, self.config)
            if isinstance(exclude_experts, ExpertSubset):
                self._warn_if_chosen_elsewhere(
                    exclude_experts, reads_weights or os.path.isdir(self.source or "")
                )
        if isinstance(self.model, EmoPreTrainedModel):
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
        if isinstance(self.model, EmoPreTrainedModel):
            training = self.model.training
            self.model.eval()
            try:
                yield LoadedLayers(self.model)
            finally:
                self.model.train(training)
            return
        checkpoint = open_checkpoint(self.model, **self.hub_kwargs)
        try:
            yield CheckpointLayers(checkpoint, self.config, token_ids, dtype=dtype, device=device or "cpu")
        finally:
            checkpoint.source.close()

    def fingerprint(self) -> str | None:
        """What the weights are recognised by, for a choice that does not run the model.

        `None` for a repository: nothing is fetched for it.
        """
        num_layers = self.config.num_hidden_layers
        if isinstance(self.model, EmoPreTrainedModel):
            return fingerprint_of(self.model.state_dict(), num_layers)
        if os.path.isdir(self.model):
            folder = os.path.join(self.model, self.hub_kwargs.get("subfolder") or "")
            return fingerprint_of_folder(folder, num_layers)
        return None

    def _warn_if_chosen_elsewhere(self, excluded: ExpertSubset, reads_weights: bool) -> None:
        source, num_layers = self.source or "", self.config.num_hidden_layers
        if isinstance(self.model, EmoPreTrainedModel):
            tensors = dict(self.model.named_parameters())
            warn_if_chosen_elsewhere(None, source, tensors, num_layers, excluded=excluded)
            return
        checkpoint = None
        if excluded.fingerprint is not None and reads_weights:
            # A choice at random needs no weights. For any other the same error comes when it reads them.
            with suppress(CheckpointError):
                checkpoint = open_checkpoint(self.model, **self.hub_kwargs)
        try:
            lazies = {} if checkpoint is None else attention_of(checkpoint)
            warn_if_chosen_elsewhere(None, source, lazies, num_layers, excluded=excluded)
        finally:
            if checkpoint is not None:
                checkpoint.source.close()


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
        commit = getattr(model.config, "_commit_hash", None)
        revision = {} if commit is None else {"revision": commit}
        return OpenedModel(model, model.config, model.name_or_path or None, revision)
    if not isinstance(model, str | os.PathLike):
        raise ValueError(
            f"Cannot choose experts of {type(model).__name__}: give an EMO model (the one inside a wrapper), "
            "a folder or a Hub repository."
        )
    _check_device(device)
    config = _read_config(model, hub_kwargs)
    return OpenedModel(model, config, os.fspath(model), pinned(model, hub_kwargs))


def _check_device(device: str | torch.device | None) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # no such device, or PyTorch was built without it
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"Cannot run on the device {device!r}: {reason}. Name one that this machine has, such as 'cpu'."
        ) from error


def _read_config(model: str | os.PathLike, hub_kwargs: dict[str, Any]) -> EmoConfig:
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
    config = EmoConfig.from_pretrained(model, **hub_kwargs)
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(
            f"The weights of {path} are quantised: give the loaded model, or the unquantised one."
        )
    return config
