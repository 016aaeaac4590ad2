"""Which rows of which OLMo-core tensor each tensor of the released layout is. Both directions use it."""

from __future__ import annotations

from dataclasses import dataclass

from ...configuration import EmoConfig

PREFIX = "model."  # of the names of parameters in a training checkpoint
EMBEDDINGS, HEAD = f"{PREFIX}embeddings.weight", f"{PREFIX}lm_head.w_out.weight"

Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class TensorPart:
    """A tensor of the released layout: rows of a tensor of the training checkpoint, reshaped or transposed.

    Args:
        name (`str`): its name in the released layout.
        shape (`tuple[int, ...]`): its shape in the released layout.
        source (`str`): the tensor of the training checkpoint.
        start, stop (`int`): the rows of that tensor, or the elements of a flat one.
        transposed (`bool`, defaults to `False`): whether these rows are columns in the released layout.

    Example: see `training_layout`.
    """

    name: str
    shape: tuple[int, ...]
    source: str
    start: int
    stop: int
    transposed: bool = False


def training_layout(config: EmoConfig) -> tuple[list[TensorPart], dict[str, Shape]]:
    """All tensors of a model in the released layout, and the shapes of those in the training checkpoint.

    Args:
        config (`EmoConfig`): the config of the model.

    Returns:
        `tuple`: the parts in the order in which they are saved, and the shape of each tensor of the training
        checkpoint. In a shape `None` stands for the padded vocabulary, which has as many rows as the config
        says, or more.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.conversion.olmo_core.layout import training_layout
    >>> parts, shapes = training_layout(EmoConfig(num_hidden_layers=1))
    >>> parts[10].name, parts[10].source, parts[10].shape, parts[10].transposed
    ('model.layers.0.mlp.experts.0.down_proj.weight', 'model.blocks.0.feed_forward_moe.experts.mlp.w2',
     (2048, 1024), True)
    >>> shapes["model.blocks.0.feed_forward_moe.router.weight"], shapes["model.embeddings.weight"]
    ((262144,), (None, 2048))

    ```
    """
    width, vocabulary, f = config.hidden_size, config.vocab_size, config.intermediate_size
    head_dim = width // config.num_attention_heads
    kv_width = head_dim * (config.num_key_value_heads or config.num_attention_heads)
    parts: list[TensorPart] = []
    shapes: dict[str, Shape] = {}

    def add(name: str, source: str, *shape: int) -> None:
        """Add a tensor that is the same in both layouts."""
        parts.append(TensorPart(name, shape, PREFIX + source, 0, shape[0]))
        shapes[PREFIX + source] = shape

    add("model.embed_tokens.weight", "embeddings.weight", vocabulary, width)
    for layer, experts in enumerate(config.layer_experts):
        to, block = f"model.layers.{layer}", f"blocks.{layer}"
        add(f"{to}.pre_attention_layernorm.weight", f"{block}.attention_norm.weight", width)
        for letter, rows in (("q", width), ("k", kv_width), ("v", kv_width)):
            add(f"{to}.self_attn.{letter}_proj.weight", f"{block}.attention.w_{letter}.weight", rows, width)
        add(f"{to}.self_attn.o_proj.weight", f"{block}.attention.w_out.weight", width, width)
        add(f"{to}.pre_feedforward_layernorm.weight", f"{block}.feed_forward_norm.weight", width)
        if experts.is_dense:
            wide = config.dense_intermediate_size or f
            add(f"{to}.mlp.gate_proj.weight", f"{block}.feed_forward.w1.weight", wide, width)
            add(f"{to}.mlp.up_proj.weight", f"{block}.feed_forward.w3.weight", wide, width)
            add(f"{to}.mlp.down_proj.weight", f"{block}.feed_forward.w2.weight", width, wide)
            continue
        count = experts.num_experts
        router = f"{PREFIX}{block}.feed_forward_moe.router.weight"
        parts.append(TensorPart(f"{to}.mlp.gate.weight", (count, width), router, 0, count * width))
        shapes[router] = (count * width,)
        stacked = f"{PREFIX}{block}.feed_forward_moe.experts.mlp"
        for expert in range(count):
            rows_of = (expert * f, (expert + 1) * f)
            name = f"{to}.mlp.experts.{expert}"
            parts.append(TensorPart(f"{name}.gate_proj.weight", (f, width), f"{stacked}.w1", *rows_of))
            parts.append(TensorPart(f"{name}.up_proj.weight", (f, width), f"{stacked}.w3", *rows_of))
            parts.append(TensorPart(f"{name}.down_proj.weight", (width, f), f"{stacked}.w2", *rows_of, True))
        shapes |= {f"{stacked}.{w}": (count * f, width) for w in ("w1", "w2", "w3")}
    add("model.norm.weight", "lm_head.norm.weight", width)
    add("lm_head.weight", "lm_head.w_out.weight", vocabulary, width)
    shapes |= {EMBEDDINGS: (None, width), HEAD: (None, width)}
    return parts, shapes
