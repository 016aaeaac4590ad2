"""The layers of a model that runs layer by layer: from memory, or read from a checkpoint.

Shape suffixes: V rows of the embedding that are needed, D hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from ...checkpoints.checkpoint import Checkpoint
from ...checkpoints.errors import CheckpointError
from ...checkpoints.hub.opening import fetch_ahead
from ...checkpoints.lazy_tensor import LazyTensor
from ...configuration import EmoConfig
from ...modeling_emo import EmoModel, EmoPreTrainedModel
from ...modeling_emo.modeling_emo import EmoExperts, EmoRotaryEmbedding
from ..fingerprint import attention_of, fingerprint_of
from ..loading.wanted_tensors import lazy_parameters


class Layers(Protocol):
    """The layers of a model, given one after the other.

    `in_memory` says whether they are all in memory. If not, a layer is read each time it is asked for.
    """

    config: EmoConfig
    in_memory: bool

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, S) token ids to (B, S, D)."""

    def rotary(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines."""

    def decoder(self, index: int) -> Any:
        """The layer with its attention, its norms, and its router or dense network."""

    def experts(self, index: int, kept: Sequence[int]) -> tuple[Any, list[int]]:
        """A stack of experts with at least those `kept`, and the ids of all in the stack, in order."""

    def mask(self, index: int) -> torch.Tensor | None:
        """The mask (E,) of the experts that the whole model uses; `None` for all."""

    def fingerprint(self) -> str | None:
        """What the weights are recognised by."""


class LoadedLayers:
    """The layers of a model in memory. Its weights are not touched.

    Args:
        model (`EmoPreTrainedModel`): the model.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo import EmoModel
    >>> from transformers_emo.subsets.choosing.layer_sources import LoadedLayers
    >>> layers = LoadedLayers(EmoModel.from_pretrained("model_cards/toy-emo"))
    >>> layers.embed(torch.tensor([[5, 6]])).shape
    torch.Size([1, 2, 128])

    ```
    """

    in_memory = True

    def __init__(self, model: EmoPreTrainedModel):
        self.model = model
        self.base: Any = model.base_model
        self.config = model.config

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, S) token ids to (B, S, D)."""
        return self.base.embed_tokens(input_ids.to(device_of(self.base.embed_tokens, input_ids.device)))

    def rotary(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines."""
        return self.base.rotary_emb(hidden, position_ids)

    def decoder(self, index: int) -> Any:
        """The layer."""
        return self.base.layers[index]

    def experts(self, index: int, kept: Sequence[int]) -> tuple[Any, list[int]]:
        """All experts of the layer."""
        return self.base.layers[index].mlp.experts, list(range(self.config.layer_experts[index].num_experts))

    def mask(self, index: int) -> torch.Tensor | None:
        """The mask of `use_experts`, if one is open."""
        return self.base.expert_masks[index]

    def fingerprint(self) -> str | None:
        """What the weights are recognised by; `None` if they are offloaded."""
        return fingerprint_of(self.model.state_dict(), self.config.num_hidden_layers)


class CheckpointLayers:
    """The layers of a checkpoint, each read when it is asked for.

    Memory holds one layer without its experts, and the experts asked for. Of the embedding only the rows of
    the calibration tokens are read.

    Args:
        checkpoint (`Checkpoint`): the weights.
        config (`EmoConfig`): their config.
        token_ids (`torch.Tensor`): the token ids that will be embedded.
        dtype (`torch.dtype`, *optional*): the dtype to run in; by default that of the config, or else that of
            the embedding.
        device (`str` or `torch.device`, defaults to `"cpu"`): where to run.

    Raises:
        CheckpointError: if a parameter is missing or has another shape. No weights have been read then.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.checkpoints import Checkpoint
    >>> from transformers_emo.subsets.choosing.layer_sources import CheckpointLayers
    >>> path, ids = "model_cards/toy-emo", torch.tensor([[5, 6]])
    >>> layers = CheckpointLayers(Checkpoint.from_folder(path), EmoConfig.from_pretrained(path), ids)
    >>> layers.embed(ids).shape
    torch.Size([1, 2, 128])
    >>> experts, held = layers.experts(0, [3, 7, 31])
    >>> experts.down_proj.shape
    torch.Size([3, 128, 64])

    ```
    """

    in_memory = False

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: EmoConfig,
        token_ids: torch.Tensor,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ):
        self.checkpoint = checkpoint
        self.config = copy.deepcopy(config)
        self.device = torch.device(device)
        with torch.device("meta"):
            self.network = EmoModel(self.config).eval()
        self.tensors = _tensors_of(checkpoint, self.network, config)
        run_in: Any = dtype or config.dtype or self.tensors["embed_tokens.weight"].dtype
        for tensor in self.tensors.values():
            if tensor.dtype.is_floating_point:
                tensor.cast_to = run_in
        with torch.device(self.device):
            self.rotary_emb = EmoRotaryEmbedding(self.config)  # type: ignore[arg-type]
        self._open: nn.Module | None = None
        self.vocabulary_V = token_ids.unique()
        self.embedding_VD: torch.Tensor | None = None

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, S) token ids to (B, S, D)."""
        if self.embedding_VD is None:
            self.embedding_VD = self.tensors["embed_tokens.weight"].take(self.vocabulary_V.tolist())[...]
        return F.embedding(torch.searchsorted(self.vocabulary_V, input_ids), self.embedding_VD)

    def rotary(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines."""
        return self.rotary_emb(hidden, position_ids)

    def decoder(self, index: int) -> Any:
        """Read the layer without its experts, and free the memory of the layer read before."""
        self.embedding_VD = None  # used before the first layer only
        if self._open is not None:
            self._open.to("meta")
        self._open = self.network.layers[index]
        self._fill(self._open, f"layers.{index}.", {})
        return self._open

    def experts(self, index: int, kept: Sequence[int]) -> tuple[Any, list[int]]:
        """Read these experts and no others."""
        kept = sorted(kept)
        with torch.device("meta"):
            experts = EmoExperts(self.config, len(kept)).eval()
        prefix = f"layers.{index}.mlp.experts."
        names = ("gate_up_proj", "down_proj")
        self._fill(experts, prefix, {name: self.tensors[prefix + name].take(kept) for name in names})
        return experts, kept

    def mask(self, index: int) -> torch.Tensor | None:
        """`None`: no mask."""
        return None

    def fingerprint(self) -> str | None:
        """What the weights are recognised by. It reads two kilobytes."""
        return fingerprint_of(attention_of(self.checkpoint), self.config.num_hidden_layers)

    def _fill(self, module: nn.Module, prefix: str, given: dict[str, LazyTensor]) -> None:
        """Read a module's parameters: those given, or else all but the experts."""
        tensors = given or {
            name: self.tensors[prefix + name] for name in module.state_dict() if ".experts." not in name
        }
        fetch_ahead(self.checkpoint.source, tensors.values())
        state = {name: tensor[...].to(self.device) for name, tensor in tensors.items()}
        module.load_state_dict(state, strict=False, assign=True)


def _tensors_of(checkpoint: Checkpoint, network: EmoModel, config: EmoConfig) -> dict[str, LazyTensor]:
    """The checkpoint's tensors by the network's own names, after a check that they fit it."""
    tensors = lazy_parameters(checkpoint, config, None)
    embedding = next((name for name in tensors if name.endswith("embed_tokens.weight")), None)
    if embedding is None:
        raise CheckpointError(
            "The checkpoint lacks embed_tokens.weight: it does not hold a whole model. Name one that does."
        )
    prefix = embedding.removesuffix("embed_tokens.weight")
    tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    for name, parameter in network.state_dict().items():
        found = tensors[name].shape if name in tensors else None
        if found != tuple(parameter.shape):
            raise CheckpointError(
                f"The checkpoint has {prefix}{name} of shape {found}, expected {tuple(parameter.shape)}: "
                "config.json and the weights are of different models. Download both again."
            )
    return tensors


def device_of(module: nn.Module, fallback: torch.device) -> torch.device:
    """The device that a module's weights are on.

    Weights that are offloaded are on none. The module's hooks then move its inputs, wherever those are.

    Args:
        module (`nn.Module`): the module.
        fallback (`torch.device`): what to return if its weights are offloaded.

    Example:

    ```python
    >>> import torch
    >>> from transformers_emo.subsets.choosing.layer_sources import device_of
    >>> device_of(torch.nn.Linear(1, 1, device="meta"), torch.device("cpu"))
    device(type='cpu')

    ```
    """
    device = next(module.parameters()).device
    return fallback if device.type == "meta" else device
