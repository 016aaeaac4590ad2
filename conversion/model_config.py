"""Reading the `config.json` of a model that is converted. Anything wrong with it is one clear error."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from ..checkpoints import CheckpointError
from ..checkpoints.small_files import read_json
from ..configuration import EmoConfig

TRAINING_SETTINGS = (
    "document_pool_min",
    "document_pool_max",
    "document_pool_eval",
    "attention_within_documents",
    "attention_dropout",
    "balance_loss_coef",
    "router_z_loss_coef",
    "lm_z_loss_coef",
)
# Lists of these lengths are made before any weight is read, so the lengths must be sensible.
_MOST = {"num_hidden_layers": 1000, "num_experts": 10_000, "num_local_experts": 10_000}
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def read_model_config(folder: Path) -> dict[str, Any]:
    """Read a `config.json` as JSON data.

    Args:
        folder (`Path`): the folder of the model.

    Returns:
        `dict[str, Any]`: the contents, with a `model_type`.

    Raises:
        CheckpointError: if the file cannot be read, is no config, or has a size that is out of range.

    Example:

    ```python
    >>> from pathlib import Path
    >>> from transformers_emo.conversion.model_config import read_model_config
    >>> read_model_config(Path("model_cards/toy-emo"))["model_type"]
    'emo'

    ```
    """
    path = folder / "config.json"
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"Cannot read {path}: {error}. Expected the config of a model.") from error
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise CheckpointError(f"{path} has no `model_type`: expected the config of a model.")
    limits = dict.fromkeys(_SIZES, 1 << 31) | _MOST
    for name, most in limits.items():
        value = content.get(name)
        least = 0 if "experts" in name else 1
        if value is not None and (type(value) is not int or not least <= value <= most):
            raise CheckpointError(
                f"`{name}` in {path} is {value!r:.60}, expected {least} to {most}: correct it."
            )
    width, heads = content.get("hidden_size"), content.get("num_attention_heads")
    if width is not None and heads is not None and width % heads:
        raise CheckpointError(
            f"`hidden_size` in {path} is {width}, not a multiple of {heads} heads: correct it."
        )
    return content


def emo_config(content: Mapping[str, Any], settings: Mapping[str, Any]) -> EmoConfig:
    """Make an `EmoConfig` of a config's contents and of settings for training.

    It does not ask for router logits.

    Args:
        content (`Mapping[str, Any]`): the contents of `config.json`.
        settings (`Mapping[str, Any]`): settings in place of the config's. `TRAINING_SETTINGS` names them.

    Raises:
        ValueError: if a setting has another name, or a value is wrong.

    Example:

    ```python
    >>> from transformers_emo.conversion.model_config import emo_config
    >>> emo_config({"model_type": "emo"}, {"lm_z_loss_coef": 0.0}).lm_z_loss_coef
    0.0

    ```
    """
    unknown = sorted(settings.keys() - set(TRAINING_SETTINGS))
    if unknown:
        raise ValueError(
            f"{unknown[0]!r} is no setting of training: expected one of {', '.join(TRAINING_SETTINGS)}."
        )
    try:
        config = EmoConfig.from_dict({**content, **settings, "output_router_logits": False})
    # Transformers does not check a config: a wrong value fails where it is first used.
    except (StrictDataclassError, TypeError, AttributeError, KeyError, IndexError, OverflowError) as error:
        raise ValueError(
            f"The config is not a model's, or the settings do not fit it ({type(error).__name__}): {error}"
        ) from error
    config.architectures = ["EmoForCausalLM"]
    return config
