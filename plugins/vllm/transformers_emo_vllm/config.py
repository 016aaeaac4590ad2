"""The config of an EMO as Transformers reads it for vLLM.

Every key of `config.json` becomes an attribute. What they mean for the network stands in `architecture.py`,
which also takes the config of `transformers-emo`, where that is imported in the same process.
"""

from typing import Any

from transformers import PreTrainedConfig


class EmoConfig(PreTrainedConfig):
    """The released `config.json` of EMO; the defaults are those of `allenai/Emo_1b14b_1T`.

    Args:
        expert_subset (`str`, *optional*): a name in the model's `subsets/`, or a file. Only these experts are
            read. Given at the start: `--hf-overrides '{"expert_subset": "coq"}'`.
        exclude_experts (*optional*): experts that are not read: a name or file, or ids by layer.
        usage_file (`str`, *optional*): where the server writes which experts its requests use; see
            `usage.py`.
        kwargs: the other keys of `config.json`.

    Example:

    ```python
    >>> from transformers_emo_vllm.config import EmoConfig
    >>> EmoConfig(num_experts=16).num_experts_per_tok
    8

    ```
    """

    model_type = "emo"
    default_theta = 500000.0

    vocab_size: int = 100278
    hidden_size: int = 2048
    intermediate_size: int = 1024
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-06
    pad_token_id: int | None = 100277
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 100257
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_bias: bool = False
    num_experts: int = 128
    num_experts_per_tok: int = 8
    num_shared_experts: int = 0  # a file that does not say has none
    num_experts_per_layer: list[int] | None = None
    num_shared_experts_per_layer: list[int] | None = None
    always_active_experts: list[int] | None = None
    always_active_experts_per_layer: list[list[int] | None] | None = None
    dense_intermediate_size: int | None = None
    dense_mlp_bias: bool = False
    norm_topk_prob: bool = False
    retained_experts: list[list[int] | None] | None = None
    root_experts_per_layer: list[int] | None = None
    expert_subset: Any = None
    exclude_experts: Any = None
    usage_file: str | None = None

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)


class LegacyEmoConfig(EmoConfig):
    """The same under the model type of the first uploads.

    Example:

    ```python
    >>> from transformers_emo_vllm.config import LegacyEmoConfig
    >>> LegacyEmoConfig.model_type
    'flex_olmo_noqknorm_prenorm'

    ```
    """

    model_type = "flex_olmo_noqknorm_prenorm"
