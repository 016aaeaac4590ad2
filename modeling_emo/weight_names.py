"""How the names on disk become the parameters of the network.

On disk every expert has three matrices of its own, `mlp.experts.<e>.{gate,up,down}_proj.weight`; in memory a
layer's experts are two stacked parameters. Registered when the network's module is imported, so that it also
holds for the copy of the code that is saved beside a model.
"""

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
