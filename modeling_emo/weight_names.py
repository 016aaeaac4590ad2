"""How the names on disk become the parameters of the network.

On disk every expert has three matrices of its own, `mlp.experts.<e>.{gate,up,down}_proj.weight`; in memory a
layer's experts are two stacked parameters. Registered when the network's module is imported, so that it also
holds for the copy of the code that is saved beside a model.
"""

import sys

from transformers import conversion_mapping
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming


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
    for module in (conversion_mapping, sys.modules.get("peft.utils.transformers_weight_conversion")):
        table = getattr(module, "_MODEL_TO_CONVERSION_PATTERN", None)
        if table is not None:
            table.setdefault(model_type, "qwen2_moe")
