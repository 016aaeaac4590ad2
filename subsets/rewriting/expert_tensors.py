"""The tensors of a checkpoint by expert: with the released names, and with the ids of the root model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...checkpoints.lazy_tensor import LazyTensor
from ...configuration import EmoConfig
from ...modeling_emo.weight_names import EXPERT_MATRIX, IN_LAYER, ROUTER, STACKED_EXPERTS
from ..numbering import present_experts

Part = Literal["routed", "shared", "router", "backbone"]


@dataclass(frozen=True)
class PartOfModel:
    """A tensor of a model, or one row of a router, by a name that subsets of one root model agree on."""

    part: Part
    layer: int | None
    tensor: LazyTensor


def released_tensors(parameters: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The parameters of the network as the tensors on disk: three matrices for each expert.

    Args:
        parameters (`dict[str, LazyTensor]`): from `lazy_parameters`: stacked experts
            `mlp.experts.gate_up_proj` (K, 2F, D) and `mlp.experts.down_proj` (K, D, F).

    Returns:
        `dict[str, LazyTensor]`: `mlp.experts.<e>.gate_proj.weight` (F, D), `.up_proj.weight` (F, D) and
        `.down_proj.weight` (D, F) instead, e from 0 to K - 1; layer by layer, the embeddings first and the
        head last.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.checkpoints import Checkpoint
    >>> from transformers_emo.subsets.rewriting.expert_tensors import released_tensors
    >>> from transformers_emo.subsets.loading.wanted_tensors import lazy_parameters
    >>> config = EmoConfig.from_pretrained("model_cards/toy-emo")
    >>> checkpoint = Checkpoint.from_folder("model_cards/toy-emo")
    >>> tensors = released_tensors(lazy_parameters(checkpoint, config, [[0, 31]] * 4))
    >>> [name.split("experts.")[1] for name in tensors if "layers.3.mlp.experts.1." in name]
    ['1.gate_proj.weight', '1.up_proj.weight', '1.down_proj.weight']

    ```
    """
    tensors: dict[str, LazyTensor] = {}
    for name in sorted(parameters, key=_place):
        match = STACKED_EXPERTS.fullmatch(name)
        if match is None:
            tensors[name] = parameters[name]
        elif match["kind"] == "gate_up":
            experts = match["experts"]
            gate_up, down = parameters[name], parameters[f"{experts}.down_proj"]
            for number in range(gate_up.shape[0]):
                of_expert = f"{experts}.{number}"
                tensors[f"{of_expert}.gate_proj.weight"] = gate_up.cut(2 * number, 2)
                tensors[f"{of_expert}.up_proj.weight"] = gate_up.cut(2 * number + 1, 2)
                tensors[f"{of_expert}.down_proj.weight"] = down.cut(number)
    return tensors


def parts_of_model(parameters: dict[str, LazyTensor], config: EmoConfig) -> dict[str, PartOfModel]:
    """A whole model in pieces, whose names are the same in all subsets of one root model.

    Args:
        parameters (`dict[str, LazyTensor]`): from `lazy_parameters`.
        config (`EmoConfig`): the config of their model.

    Returns:
        `dict[str, PartOfModel]`: matrices of experts and rows of routers, with the ids of the root model in
        their names (`layers.3.mlp.experts.17.up_proj.weight`, `layers.3.mlp.gate.weight[17]`), and all other
        tensors by their own. The prefix `model.` is left out.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.checkpoints import Checkpoint
    >>> from transformers_emo.subsets.rewriting.expert_tensors import parts_of_model
    >>> from transformers_emo.subsets.loading.wanted_tensors import lazy_parameters
    >>> config = EmoConfig.from_pretrained("model_cards/toy-emo")
    >>> checkpoint = Checkpoint.from_folder("model_cards/toy-emo")
    >>> parts = parts_of_model(lazy_parameters(checkpoint, config, None), config)
    >>> parts["layers.0.mlp.experts.31.up_proj.weight"].part, parts["layers.0.mlp.gate.weight[31]"].part
    ('shared', 'router')

    ```
    """
    present = present_experts(config)
    layers = config.layer_experts
    parts: dict[str, PartOfModel] = {}
    for name, tensor in released_tensors(parameters).items():
        name = name.removeprefix("model.")
        if match := EXPERT_MATRIX.fullmatch(name):
            index, local = int(match["layer"]), int(match["expert"])
            shared = local in layers[index].always_used
            key = f"{match['mlp']}.experts.{present[index][local]}.{match['part']}_proj.weight"
            parts[key] = PartOfModel("shared" if shared else "routed", index, tensor)
        elif match := ROUTER.fullmatch(name):
            index = int(match["layer"])
            for local, root in enumerate(present[index]):
                row = tensor.cut(local)
                parts[f"{name}[{root}]"] = PartOfModel("router", index, row)
        else:
            parts[name] = PartOfModel("backbone", None, tensor)
    return parts


def _place(name: str) -> tuple[int, int]:
    """Where a parameter stands in a file: as it is needed, from the embeddings to the head."""
    match = IN_LAYER.fullmatch(name)
    if match:
        return 1, int(match["layer"])
    return (0, 0) if "embed" in name else (2, 0)
