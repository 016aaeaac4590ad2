"""The names of tensors on disk, and how they become the parameters of the network.

On disk every expert has three matrices of its own, `mlp.experts.<e>.{gate,up,down}_proj.weight`; in memory a
layer's experts are two stacked parameters. Registered when the network's module is imported, so that it also
holds for the copy of the code that is saved beside a model.
"""

import re
import sys

_MLP = r"(?P<mlp>(?P<block>(?:.*\.)?)layers\.(?P<layer>\d+)\.mlp)"
EXPERT_MATRIX = re.compile(_MLP + r"\.experts\.(?P<expert>\d+)\.(?P<part>gate|up|down)_proj\.weight")
"""A matrix of one expert, on disk. `block` is what stands before `layers.`, `mlp` the name up to `.mlp`."""
STACKED_EXPERTS = re.compile(rf"(?P<experts>{_MLP}\.experts)\.(?P<kind>gate_up|down)_proj")
"""The experts of a layer, as the network has them; some checkpoints have them too."""
ROUTER = re.compile(_MLP + r"\.gate\.weight")
"""The router of a layer: a row for each expert."""
IN_LAYER = re.compile(r"(?:.*\.)?layers\.(?P<layer>\d+)\.(?P<part>.+)")
"""Any tensor of a layer."""
ATTENTION_MATRIX = re.compile(r"(?:.*\.)?(?P<matrix>layers\.\d+\.self_attn\.[qkvo]_proj)\.weight")
"""A matrix of the attention."""
SIZED_BY_EXPERTS = re.compile(r".*\.layers\.\d+\.mlp\.(experts|gate)\..*")
"""A tensor of an adapter that has a size for each expert."""
EXPERT_PARAMETERS = ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
"""The parameters of a layer's `mlp` that have a row for each expert."""


def register_weight_names(model_type: str) -> None:
    """Tell Transformers how checkpoints of `model_type` are laid out, for loading and for saving.

    Args:
        model_type (`str`): the config's model type, `"emo"`.

    Example:

    ```python
    >>> from transformers_emo.modeling_emo.weight_names import register_weight_names
    >>> register_weight_names("emo")

    ```
    """
    # Not above: subsets and fingerprints read the patterns, and need none of Transformers for it.
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

    mapping: list[WeightConverter | WeightRenaming] = [
        WeightConverter(
            source_patterns=["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            target_patterns="mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns="mlp.experts.*.down_proj.weight",
            target_patterns="mlp.experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ]
    register_checkpoint_conversion_mapping(model_type, mapping, overwrite=True)
    _register_with_peft(model_type)


def _register_with_peft(model_type: str) -> None:
    """Have PEFT read `gate_proj`, `up_proj`, `down_proj` and `gate` as the stacked parameters they became.

    PEFT asks this table which family a model is of, and knows the names of Qwen2-MoE's: EMO's are the same.
    Without it, `target_modules=["q_proj", "gate_proj"]` leaves the experts out and says nothing. PEFT copies
    the table when it first adapts a model, which may have been before this import.
    """
    from transformers import conversion_mapping

    for module in (conversion_mapping, sys.modules.get("peft.utils.transformers_weight_conversion")):
        table = getattr(module, "_MODEL_TO_CONVERSION_PATTERN", None)
        if table is not None:
            table.setdefault(model_type, "qwen2_moe")
