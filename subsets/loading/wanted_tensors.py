"""The tensors of a network with some of its experts, found in a checkpoint."""

from __future__ import annotations

from ...checkpoints.checkpoint import Checkpoint, rows_of
from ...checkpoints.errors import CheckpointError
from ...checkpoints.lazy_tensor import LazyTensor
from ...configuration import EmoConfig
from ...modeling_emo.weight_names import EXPERT_MATRIX, EXPERT_PARAMETERS, ROUTER, STACKED_EXPERTS
from ...quantization.packed_files import plain_name
from .weights_check import check_sizes


def is_wanted(kept: list[list[int] | None], name: str) -> bool:
    """Whether a tensor of a checkpoint belongs to a kept expert, or to no expert.

    Args:
        kept (`list[list[int] | None]`): for each layer the experts to keep, in the checkpoint's numbering.
        name (`str`): the tensor's name.

    Example:

    ```python
    >>> from transformers_emo.subsets.loading.wanted_tensors import is_wanted
    >>> name = "model.layers.0.mlp.experts.7.up_proj.weight"
    >>> is_wanted([[7, 9]], name), is_wanted([[9]], name), is_wanted([[9]], "model.norm.weight")
    (True, False, True)

    ```
    """
    match = EXPERT_MATRIX.fullmatch(plain_name(name))
    if match is None or int(match["layer"]) >= len(kept):
        return True
    return int(match["expert"]) in (kept[int(match["layer"])] or ())


def lazy_parameters(
    checkpoint: Checkpoint,
    config: EmoConfig,
    kept: list[list[int] | None] | None,
    *,
    sizes_checked: bool = False,
    any_size: bool = False,
) -> dict[str, LazyTensor]:
    """The parameters of the network, each made of the bytes of the kept experts.

    Args:
        checkpoint (`Checkpoint`): the weights, with a tensor for each expert or already stacked.
        config (`EmoConfig`): the config of the checkpoint.
        kept (`list[list[int] | None]`, *optional*): for each layer the experts to keep, in the checkpoint's
            own numbering, `None` for a dense layer; all of them by default.
        sizes_checked (`bool`, defaults to `False`): `check_sizes` has been called with these weights.
        any_size (`bool`, defaults to `False`): take tensors in the sizes that they have, whatever the config
            says.

    Returns:
        `dict[str, LazyTensor]`: under the network's parameter names, with the checkpoint's prefix: expert
        matrices stacked into `mlp.experts.gate_up_proj` (K, 2F, D) and `mlp.experts.down_proj` (K, D, F),
        router rows cut to the K kept.

    Raises:
        CheckpointError: if an expert or a router that should be there is missing or has another shape.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.checkpoints import Checkpoint
    >>> from transformers_emo.subsets.loading.wanted_tensors import lazy_parameters
    >>> config = EmoConfig.from_pretrained("model_cards/toy-emo")
    >>> tensors = lazy_parameters(Checkpoint.from_folder("model_cards/toy-emo"), config, [[0, 5, 31]] * 4)
    >>> tensors["model.layers.0.mlp.gate.weight"].shape
    (3, 128)

    ```
    """
    if not (sizes_checked or any_size):
        check_sizes(checkpoint.tensors, config)
    if kept is None:
        kept = [list(range(layer.num_experts)) for layer in config.layer_experts]
    kept_ids = [ids or [] for ids in kept]
    width, hidden = config.intermediate_size, config.hidden_size
    if any_size:
        shapes = (
            span.shape for name, span in checkpoint.tensors.items() if name.endswith(".0.up_proj.weight")
        )
        width, hidden = next((shape for shape in shapes if len(shape) == 2), (width, hidden))
    separate: dict[int, set[int]] = {}  # of layers with a tensor for each expert: the experts there are
    block = ""  # what stands before `layers.` in the checkpoint's names
    lazies: dict[str, LazyTensor] = {}
    for name, span in checkpoint.tensors.items():
        if match := EXPERT_MATRIX.fullmatch(name):
            separate.setdefault(int(match["layer"]), set()).add(int(match["expert"]))
            block = match["block"]
            expected = (hidden, width) if match["part"] == "down" else (width, hidden)
            if span.shape != expected:
                raise CheckpointError(
                    f"{name} has shape {span.shape}, expected {expected}: config.json and the weights differ."
                )
        elif match := STACKED_EXPERTS.fullmatch(name) or ROUTER.fullmatch(name):
            layer = int(match["layer"])
            _check_size(config, layer, span.shape[0] if span.shape else 0)
            ids = kept_ids[layer]
            lazies[name] = checkpoint.from_pieces(rows_of(span, ids), (len(ids), *span.shape[1:]))
        else:
            lazies[name] = checkpoint.lazy([name])
    for name in checkpoint.elsewhere:
        if match := EXPERT_MATRIX.fullmatch(name):
            separate.setdefault(int(match["layer"]), set()).add(int(match["expert"]))
    for layer, present in separate.items():
        _check_size(config, layer, len(present))
        experts, ids = f"{block}layers.{layer}.mlp.experts", kept_ids[layer]
        pairs = [f"{experts}.{e}.{half}_proj.weight" for e in ids for half in ("gate", "up")]
        downs = [f"{experts}.{e}.down_proj.weight" for e in ids]
        lazies[f"{experts}.gate_up_proj"] = checkpoint.lazy(pairs, shape=(len(ids), 2 * width, hidden))
        lazies[f"{experts}.down_proj"] = checkpoint.lazy(downs, shape=(len(ids), hidden, width))
    _check_complete(lazies, config)
    return lazies


def _check_size(config: EmoConfig, layer: int, present: int) -> None:
    """Check that the layer exists and has as many experts as the config says."""
    expected = config.layer_experts[layer].num_experts if layer < config.num_hidden_layers else 0
    if present != expected or expected == 0:
        raise CheckpointError(
            f"The checkpoint has {present} experts in layer {layer}, expected {expected}: config.json and "
            "the weights differ."
        )


def _check_complete(lazies: dict[str, LazyTensor], config: EmoConfig) -> None:
    """Check that every expert layer has its three parameters."""
    names = {name[name.index("layers.") :] for name in lazies if "layers." in name}
    for index, layer in enumerate(config.layer_experts):
        for parameter in () if layer.is_dense else EXPERT_PARAMETERS:
            if f"layers.{index}.mlp.{parameter}" not in names:
                raise CheckpointError(
                    f"The checkpoint lacks layers.{index}.mlp.{parameter}: config.json and the weights "
                    "differ."
                )
