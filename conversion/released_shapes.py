"""The shapes of all tensors of a model in the released layout."""

from __future__ import annotations

from collections.abc import Mapping

from ..checkpoints import CheckpointError
from ..configuration import EmoConfig
from .olmo_core.layout import training_layout


def check_released_shapes(shapes: Mapping[str, tuple[int, ...]], config: EmoConfig) -> None:
    """Check that tensors are those that a config describes, all of them and no others.

    Args:
        shapes (`Mapping[str, tuple[int, ...]]`): the shapes of tensors by their names in the released layout.
        config (`EmoConfig`): the config.

    Raises:
        CheckpointError: if one is missing, too many or of another shape.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.checkpoints import Checkpoint
    >>> from transformers_emo.conversion.released_shapes import check_released_shapes
    >>> tensors = Checkpoint.from_folder("model_cards/toy-emo").tensors
    >>> shapes = {name: span.shape for name, span in tensors.items()}
    >>> check_released_shapes(shapes, EmoConfig.from_pretrained("model_cards/toy-emo"))

    ```
    """
    expected = {part.name: part.shape for part in training_layout(config)[0]}
    dense = {f"model.layers.{i}.mlp." for i, layer in enumerate(config.layer_experts) if layer.is_dense}
    for name, shape in list(expected.items()):
        is_dense = name[: name.find(".mlp.") + len(".mlp.")] in dense
        if (config.attention_bias and ".self_attn." in name) or (config.dense_mlp_bias and is_dense):
            expected[name.replace(".weight", ".bias")] = shape[:1]
    if config.tie_word_embeddings:  # some tools save the head too
        expected.pop("lm_head.weight")
        shapes = {name: shape for name, shape in shapes.items() if name != "lm_head.weight"}
    unknown, missing = shapes.keys() - expected.keys(), expected.keys() - shapes.keys()
    if unknown:
        raise CheckpointError(
            f"The checkpoint has {len(unknown)} tensors that config.json does not explain, such as "
            f"{min(unknown)}: it is of another model. Use the one that belongs to the weights."
        )
    if missing:
        raise CheckpointError(
            f"The checkpoint lacks {len(missing)} tensors that config.json asks for, such as {min(missing)}: "
            "download it again."
        )
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise CheckpointError(
                f"{name} is of shape {list(shapes[name])}, expected {list(shape)} by config.json: use the "
                "one that belongs to the weights."
            )
