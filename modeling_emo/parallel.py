"""What several processes cannot compute together: it is refused here, before a wrong number comes out."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ..configuration.configuration_emo import EmoConfig

# What a stage of a pipeline would drop, or compute from hidden states that it takes for embeddings.
_WANTS_ALL_LAYERS = (
    "attention_within_documents",
    "document_ids",
    "document_pool",
    "document_pool_sizes",
    "labels",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "prompt_pool",
    "training_step",
)


def check_distribution(config: EmoConfig, distributed_config: Any) -> None:
    """Check that a model can be cut as asked.

    Args:
        config (`EmoConfig`): the config of the model.
        distributed_config (`DistributedConfig`): how Transformers is to distribute it.

    Raises:
        ValueError: if a layer's experts, or the heads of the attention, do not go round.

    Example:

    ```python
    >>> from transformers.distributed import DistributedConfig
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.modeling_emo.parallel import check_distribution
    >>> try:
    ...     check_distribution(EmoConfig(num_attention_heads=4), DistributedConfig(tp_size=3))
    ... except ValueError as error:
    ...     print(str(error)[:54])
    Tensor parallelism shares 4 heads of attention among 3

    ```
    """
    tensor_parallel = distributed_config.tp_size or 1
    # In older versions expert parallelism takes the place of tensor parallelism, and has its size.
    only_experts = not hasattr(distributed_config, "ep_size") and distributed_config.enable_expert_parallel
    processes = tensor_parallel if only_experts else getattr(distributed_config, "ep_size", None) or 1
    for index, layer in enumerate(config.layer_experts):
        fewer = layer.num_experts // processes * processes
        if fewer == layer.num_experts:
            continue
        possible = [number for number in (fewer, fewer + processes) if number >= layer.top_k]
        raise ValueError(
            f"Expert parallelism gives each of {processes} processes equally many experts, and layer {index} "
            f"has {layer.num_experts}: load {' or '.join(map(str, possible))} experts (`expert_subset=` "
            f"with `top({possible[0]})`), or another number of processes."
        )
    heads = {config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads}
    uneven = sorted(number for number in heads if number % tensor_parallel)
    if uneven and not only_experts and distributed_config.tp_plan != {}:
        raise ValueError(
            f"Tensor parallelism shares {uneven[0]} heads of attention among {tensor_parallel} processes: "
            f"choose a `tp_size` that divides {uneven[0]}."
        )


def refuse_in_pipeline(model: Any, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Check a forward of a pipeline (`pp_size`): its stages pass on hidden states, and nothing else.

    Args:
        model (`EmoForCausalLM`): this process's stage.
        args, kwargs: of the forward.

    Raises:
        ValueError: in every process, before any waits for another, if the forward asks for more.

    Example: it is the forward pre-hook of a model that was loaded with `DistributedConfig(pp_size=...)`.
    """
    given = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | dict(kwargs)
    asked = [name for name in _WANTS_ALL_LAYERS if given.get(name) is not None and given[name] is not False]
    if model.base_model.default_document_pool is not None and given.get("document_pool") is not False:
        asked.append("default_document_pool")
    if asked:
        raise ValueError(
            f"A pipeline of {model.config.distributed_config.pp_size} processes computes logits and no more, "
            f"and this forward asks for `{asked[0]}`: leave it out, or "
            "use tensor or expert parallelism (`tp_size`, `ep_size`), which compute everything."
        )


def is_sequence_split() -> bool:
    """Whether each process has a part of the sequences only: within PyTorch's `context_parallel`.

    Example:

    ```python
    >>> from transformers_emo.modeling_emo.parallel import is_sequence_split
    >>> is_sequence_split()
    False

    ```
    """
    if torch.compiler.is_compiling():
        return False
    # There the attention is another function.
    return str(getattr(F.scaled_dot_product_attention, "__module__", None)).startswith("torch.distributed")


def refuse_split_sequences() -> None:
    """Refuse documents where sequences are split: a process sees the rest of a document nowhere.

    Raises:
        ValueError: within PyTorch's `context_parallel`.

    Example: `EmoModel.forward` calls it where documents have pools, or tokens attend to their document only.
    """
    if is_sequence_split():
        raise ValueError(
            "Context parallelism splits sequences among processes, so none sees a whole document, and pools "
            "and attention within documents would be wrong: pass `document_pool=False` and "
            "`attention_within_documents=False`, or shard parameters instead (FSDP, `tp_size`, `ep_size`)."
        )
