"""Whether a checkpoint holds all of the network that its config describes, not only the experts."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..configuration import EmoConfig
from ..modeling_emo import EmoModel
from .checkpoint import LazyTensor
from .safetensors_header import CheckpointError


def check_whole(parameters: Mapping[str, LazyTensor], config: EmoConfig, label: str) -> None:
    """See that every parameter of the network is there in its shape.

    Transformers would fill what is missing with random numbers: a model that is copied must have it all.

    Args:
        parameters (`Mapping[str, LazyTensor]`): from `lazy_parameters`, with all experts or some.
        config (`EmoConfig`): the config of the model with those experts.
        label (`str`): what the model is called in messages.

    Raises:
        CheckpointError: if one is missing or of another shape.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.subsets import Checkpoint
    >>> from transformers_emo.subsets.completeness import check_whole
    >>> from transformers_emo.subsets.loading import lazy_parameters
    >>> toy = "model_cards/toy-emo"
    >>> config = EmoConfig.from_pretrained(toy)
    >>> check_whole(lazy_parameters(Checkpoint.from_folder(toy), config, None), config, toy)

    ```
    """
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in EmoModel(config).state_dict().items()}
    if "EmoForCausalLM" in (config.architectures or []) and not config.tie_word_embeddings:
        expected["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    there = {name.removeprefix("model."): tensor.shape for name, tensor in parameters.items()}
    for name, shape in expected.items():
        if name not in there:
            raise CheckpointError(
                f"{label} lacks the tensor {name}, which its config asks for: download it again."
            )
        if there[name] != shape:
            raise CheckpointError(
                f"{name} of {label} has shape {list(there[name])}, expected {list(shape)} by its config."
            )
