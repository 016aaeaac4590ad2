"""`EmoConfig`: the released `config.json` of EMO, read and written as released.

The keys and their meaning are those of https://github.com/allenai/EMO; the paper is
https://arxiv.org/abs/2605.06663.
"""

import dataclasses
from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from typing import Any, Literal, get_args

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from .config_checks import (
    BY_LAYER,
    check_document_pools,
    check_experts,
    check_heads,
    check_lists,
    check_rotary_embedding,
    check_theta,
    check_values,
)
from .layer_experts import LayerExperts

# The name under which the first uploads of EMO were published. Their tensors are the same as those of `emo`.
LEGACY_MODEL_TYPE = "flex_olmo_noqknorm_prenorm"
_LEGACY_ARCHITECTURE = "FlexOlmoNoQKNormPrenormForCausalLM"

prepare_config: ContextVar[Callable[[Any], None] | None] = ContextVar("prepare_config", default=None)
"""What is to be done with a config that is read from a file, while a model is loaded."""

_DENSE_TP_PLAN = {
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}


# The largest values that are taken from a file. Lists of these lengths are made before any weight is read.
_MOST_IN_FILES = {
    "num_hidden_layers": 1000,
    "num_experts": 10_000,
    "num_local_experts": 10_000,
    "num_labels": 10**6,
}
# Transformers does not check the types of a file's values. A wrong one ends in one of these errors.
_MISFITS = (
    StrictDataclassError,
    TypeError,
    AttributeError,
    KeyError,
    IndexError,
    OverflowError,
    RecursionError,
)

# Settings that are not in released files, and their defaults.
_OWN_DEFAULTS = {
    "retained_experts": None,
    "root_experts_per_layer": None,
    "document_pool_min": None,
    "document_pool_max": None,
    "document_pool_eval": None,
    "document_boundaries": "eos",
    "attention_within_documents": False,
    "balance_loss_coef": 0.1,
    "router_z_loss_coef": 0.001,
    "lm_z_loss_coef": 1e-5,
}


def _errors_in_one_line(cls: type) -> type:
    """Have the errors of `@strict` say in one line what they say in two."""
    init: Callable = cls.__init__  # type: ignore[misc]

    @wraps(init)
    def initialise(self, *args, **kwargs):
        try:
            init(self, *args, **kwargs)
        except StrictDataclassError as error:
            error.args = (_one_line(error),)
            raise
        except KeyError as error:  # a kind of rotary embedding lacks a setting
            raise ValueError(f"`rope_scaling` is incomplete: {_one_line(error)}. Give it.") from error

    cls.__init__ = initialise  # type: ignore[misc]
    return cls


def _one_line(error: Exception) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split())


@_errors_in_one_line
@strict
class EmoConfig(PreTrainedConfig):
    r"""Configuration of an EMO model (https://arxiv.org/abs/2605.06663).

    The defaults are those of `allenai/Emo_1b14b_1T`. `config.json` keeps the released keys (`rope_theta` and
    `rope_scaling` rather than `rope_parameters`), so that other tools read what is saved.

    Args:
        vocab_size (`int`, defaults to 100278): rows of the embedding and of the language-model head.
        hidden_size (`int`, defaults to 2048): width d of the residual stream.
        intermediate_size (`int`, defaults to 1024): width f of one expert.
        num_hidden_layers (`int`, defaults to 16): number of decoder layers L.
        num_attention_heads (`int`, defaults to 16): query heads.
        num_key_value_heads (`int`, *optional*): key and value heads; `num_attention_heads` when not given.
        num_experts (`int`, defaults to 128): experts per layer E, shared ones included.
        num_experts_per_tok (`int`, defaults to 8): experts per token k, shared ones included. A layer with
            fewer experts takes them all.
        num_shared_experts (`int`, defaults to 1): shared experts per layer S: the last S indices.
        num_experts_per_layer (`list[int]`, *optional*): E of each layer, where layers differ. 0 makes the
            layer dense.
        num_shared_experts_per_layer (`list[int]`, *optional*): S of each layer; `min(num_shared_experts, E)`
            when not given.
        always_active_experts (`list[int]`, *optional*): ids that every token takes in every layer.
        always_active_experts_per_layer (`list[list[int]]`, *optional*): the same, layer by layer.
        dense_intermediate_size (`int`, *optional*): width of dense layers; needed when there are any.
        dense_mlp_bias (`bool`, defaults to `False`): whether dense layers have biases.
        norm_topk_prob (`bool`, defaults to `False`): renormalise the routing weights of the picked experts.
            Refused with shared or always-active experts.
        output_router_logits (`bool` or `"training"`, defaults to `False`): return the routers' raw logits and
            add the balance loss to the loss. `"training"` does so in training mode only. Every released file
            says `true`, which would slow down plain generation and evaluation. So a `true` in a file is read
            as `"training"`, and `"training"` is written as `true`.
        router_aux_loss_coef (`float`, defaults to 0.01): weight of the balance loss.
        document_pool_min, document_pool_max (`int`, *optional*): train with document pools. In every layer
            the tokens of a document may then use only a pool of routed experts. Its size is drawn from this
            range, both ends included, for each layer and document. Without the two there are no pools. EMO
            was trained with 8 and 128.
        document_pool_eval (`int`, *optional*): the pool size of evaluation with `document_pool=True`. If a
            model has fewer experts, as a small subset has, pools hold all of them.
        document_boundaries (`str`, defaults to `"eos"`): where the segments of routing begin, unless a call
            says it: `"eos"` at every EOS token (as EMO was trained), `"after_eos"` after it, `"position_ids"`
            where position ids start again.
        attention_within_documents (`bool`, defaults to `False`): in training, tokens attend to their own
            document only. EMO was trained so; its baselines were not.
        balance_loss_coef (`float`, defaults to 0.1): weight of the balance loss of training with pools.
        router_z_loss_coef (`float`, defaults to 0.001): weight of the routers' z-loss, with pools.
        lm_z_loss_coef (`float`, defaults to 1e-5): weight of the z-loss of the language-model head, with
            pools.
        retained_experts (`list[list[int] | None]`, *optional*): for a model that holds only a subset of its
            experts, the ids kept in each layer, in the numbering of the root model (`None` for a dense
            layer).
        root_experts_per_layer (`list[int]`, *optional*): for such a model, E of each layer of the root model.

    Raises:
        ValueError: if no network can have a value: a size below 1, a number that is not finite, an unknown
            kind of rotary embedding or activation.
        StrictDataclassClassValidationError: if the expert counts or pool sizes contradict each other; the
            message names the value and the layer.
        StrictDataclassFieldValidationError: if a value is of the wrong type.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> config = EmoConfig(num_hidden_layers=2, num_experts=16, num_experts_per_tok=4)
    >>> [layer.num_routed for layer in config.layer_experts]
    [15, 15]

    ```
    """

    model_type = "emo"
    # `Trainer` gathers every output that is not named here as a prediction.
    keys_to_ignore_at_inference = [
        "past_key_values",
        "cache",  # the same, as Transformers calls it from 5.24 on
        "aux_loss",
        "router_logits",
        "ce_loss",
        "router_z_loss",
        "lm_z_loss",
        "router_statistics",
        "expert_counts",
        "document_pool_size",
    ]
    attribute_map = {"num_local_experts": "num_experts"}
    default_theta = 500000.0
    # As OLMoE's plan, but simpler for attention, since EMO has no norm on queries and keys.
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }
    base_model_ep_plan = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }

    vocab_size: int = 100278
    hidden_size: int = 2048
    intermediate_size: int = 1024
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-06
    use_cache: bool = True
    pad_token_id: int | None = 100277
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 100257
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    attention_dropout: float | int | None = 0.0
    num_experts: int = 128
    num_experts_per_tok: int = 8
    num_shared_experts: int = 1
    num_experts_per_layer: list[int] | None = None
    num_shared_experts_per_layer: list[int] | None = None
    always_active_experts: list[int] | None = None
    always_active_experts_per_layer: list[list[int]] | None = None
    dense_intermediate_size: int | None = None
    dense_mlp_bias: bool = False
    norm_topk_prob: bool = False
    output_router_logits: bool | Literal["training"] = False
    router_aux_loss_coef: float = 0.01
    document_pool_min: int | None = None
    document_pool_max: int | None = None
    document_pool_eval: int | None = None
    document_boundaries: Literal["eos", "after_eos", "position_ids"] = "eos"
    attention_within_documents: bool = False
    balance_loss_coef: float = 0.1
    router_z_loss_coef: float = 0.001
    lm_z_loss_coef: float = 1e-5
    retained_experts: list[list[int] | None] | None = None
    root_experts_per_layer: list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self.validate_values()
        super().__post_init__(**kwargs)
        self.validate_rotary_embedding()
        if not hasattr(self, "auto_map"):  # TRL asks for it; it stands for code saved beside a model
            self.auto_map: dict[str, str] = {}
        if self.num_experts_per_layer is not None and 0 in self.num_experts_per_layer:
            self.base_model_tp_plan = {**type(self).base_model_tp_plan, **_DENSE_TP_PLAN}

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "rope_parameters" and self._rope_is_known() and (value is None or isinstance(value, dict)):
            # Also what is set as `rope_scaling`. Neither has to say `rope_theta`: it stays what it was.
            value = dict(value or {})
            value.setdefault("rope_type", value.get("type", "default"))
            if value.get("rope_theta") is None:
                value["rope_theta"] = self.rope_theta
        elif name == "num_hidden_layers" and isinstance(value, int) and value > 0:
            self._fit_lists(value)
        elif name in BY_LAYER and "_further_layers" in self.__dict__:
            self.__dict__["_further_layers"].pop(name, None)
        super().__setattr__(name, value)

    def _fit_lists(self, num_layers: int) -> None:
        """Cut what is listed by layer to the first layers; what is cut off comes back with its layers.

        Generation with `assistant_early_exit` takes the last layers out for a while.
        """
        further = self.__dict__.pop("_further_layers", {})
        for name in BY_LAYER:
            value = self.__dict__.get(name)
            if value is not None:
                whole = [*value, *further.get(name, ())]
                setattr(self, name, whole[:num_layers])
                if whole[num_layers:]:
                    further = further | {name: whole[num_layers:]}
                else:
                    further.pop(name, None)
        if further:
            self.__dict__["_further_layers"] = further

    def _rope_is_known(self) -> bool:
        """Whether the config is made: until then a missing `rope_theta` may come from its file."""
        return (self.__dict__.get("rope_parameters") or {}).get("rope_theta") is not None

    @property
    def rope_theta(self) -> float:
        """`float`: the base of the rotary embedding, which `rope_parameters` holds; may be set.

        Example:

        ```python
        >>> from transformers_emo import EmoConfig
        >>> config = EmoConfig(rope_theta=10000.0)
        >>> config.rope_parameters = {"rope_type": "linear", "factor": 2.0}
        >>> config.rope_theta
        10000.0

        ```
        """
        rope: dict[str, Any] = dict(self.rope_parameters or {})
        theta = rope.get("rope_theta")
        return self.default_theta if theta is None else theta

    @rope_theta.setter
    def rope_theta(self, value: float) -> None:
        check_theta(value)
        self.rope_parameters = dict(self.rope_parameters or {}) | {"rope_theta": value}

    @property
    def layer_experts(self) -> list[LayerExperts]:
        """`list[LayerExperts]`: the experts of each layer, all per-layer settings resolved."""
        num_layers = self.num_hidden_layers
        check_lists(self)
        experts = self.num_experts_per_layer or [self.num_experts] * num_layers
        shared = self.num_shared_experts_per_layer or [min(self.num_shared_experts, e) for e in experts]
        always = self.always_active_experts_per_layer or [self.always_active_experts or []] * num_layers
        return [
            LayerExperts(e, s, tuple(a) if e else (), min(self.num_experts_per_tok, e))
            for e, s, a in zip(experts, shared, always, strict=True)
        ]

    def validate_values(self):
        """Part of `@strict` validation; see `config_checks.check_values`."""
        check_values(self)

    def validate_rotary_embedding(self):
        """Part of `@strict` validation; see `config_checks.check_rotary_embedding`."""
        check_rotary_embedding(self)

    def validate_experts(self):
        """Part of `@strict` validation; see `config_checks.check_experts`."""
        check_experts(self)

    def validate_document_pools(self):
        """Part of `@strict` validation; see `config_checks.check_document_pools`."""
        check_document_pools(self)

    def check_heads(self) -> None:
        """Check the width of an attention head, when a network is built or a file is read.

        A config that is made for experts alone need not have any heads.

        Raises:
            ValueError: if it is not even.
        """
        check_heads(self)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path, **kwargs
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in Transformers, but a config of the legacy model type is returned under its new name."""
        try:
            config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
            return _modernise(config_dict), kwargs
        except (TypeError, RecursionError) as error:
            raise ValueError(
                f"The config of {pretrained_model_name_or_path} is damaged: expected a JSON object of "
                f"settings ({error}). Download it again, or correct it."
            ) from error

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Build a config from the contents of a `config.json`, released or saved by this library.

        Args:
            config_dict (`dict[str, Any]`): the file's contents. A legacy model type and architecture are
                renamed; `output_router_logits: true` becomes `"training"`; a file without
                `num_shared_experts` has none.
            kwargs: settings that override the file's; with `return_unused_kwargs=True` the rest is returned
                too.

        Raises:
            ValueError: if a value is of another kind than it must be, absurdly large or contradicts others.

        Example:

        ```python
        >>> from transformers_emo import EmoConfig
        >>> EmoConfig.from_dict({"model_type": "emo", "output_router_logits": True}).output_router_logits
        'training'

        ```
        """
        try:
            return cls._from_file(config_dict, **kwargs)
        except _MISFITS as error:
            raise ValueError(f"The config does not describe an EMO model: {_one_line(error)}") from error

    @classmethod
    def _from_file(cls, config_dict: dict[str, Any], **kwargs):
        config_dict = cls._clean(_modernise(config_dict))
        if not isinstance(config_dict.get("model_type", ""), str):
            raise ValueError(
                f"`model_type` of the config is {config_dict['model_type']!r:.60}, expected a name: write "
                f"{cls.model_type!r}."
            )
        for name in ("dtype", "torch_dtype"):
            if isinstance(config_dict.get(name), int | float | list):
                raise ValueError(
                    f"`{name}` of the config is {config_dict[name]!r:.60}, expected a name: write one, such "
                    "as 'bfloat16'."
                )
        for name, most in _MOST_IN_FILES.items():
            value = kwargs.get(name, config_dict.get(name))
            if isinstance(value, int | float) and not value <= most:
                raise ValueError(
                    f"`{name}` of the config is {value}, expected at most {most}: correct the file."
                )
        for value in config_dict.get("num_experts_per_layer") or ():
            if isinstance(value, int | float) and not value <= _MOST_IN_FILES["num_experts"]:
                raise ValueError(
                    f"A layer of the config has {value} experts, expected at most "
                    f"{_MOST_IN_FILES['num_experts']}: correct `num_experts_per_layer`."
                )
        config_dict.setdefault("num_shared_experts", 0)
        if config_dict.get("eos_token_id") == []:
            raise ValueError(
                "`eos_token_id` of the config is an empty list: write an id, several ids or null."
            )
        if config_dict.get("output_router_logits") is True:
            config_dict["output_router_logits"] = "training"
        if not cls.is_remote_code():
            # The released `auto_map` names remote code that this class replaces. If it stayed, it would be
            # saved beside weights that come without that code.
            config_dict.pop("auto_map", None)
        result = super().from_dict(config_dict, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        config.check_heads()
        if (prepare := prepare_config.get()) is not None:
            prepare(config)
        return result

    @classmethod
    def _clean(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        """Replace a null by the default where a value is needed, and an integer by a float where one is."""
        types = {field.name: field.type for field in dataclasses.fields(cls)}
        types |= {"rope_theta": float}  # a key of released files, but no field here
        cleaned = {}
        for name, value in config_dict.items():
            wanted = types.get(name)
            if value is None and wanted is not None and type(None) not in get_args(wanted):
                continue
            if wanted is float and type(value) is int:
                value = float(value)
            if name == "always_active_experts_per_layer" and isinstance(value, list):
                value = [ids or [] for ids in value]
            cleaned[name] = value
        return cleaned

    def to_dict(self) -> dict[str, Any]:
        """`dict[str, Any]`: the config under the released keys, as `config.json` holds it."""
        output = super().to_dict()
        output.pop("_further_layers", None)
        rope = dict(output.pop("rope_parameters", None) or {})
        output["rope_theta"] = rope.pop("rope_theta", self.default_theta)
        output["rope_scaling"] = None if rope in ({}, {"rope_type": "default"}) else rope
        if output.get("output_router_logits") == "training":
            output["output_router_logits"] = True
        # Settings that released files do not have are written only if they differ from their defaults.
        for name, default in _OWN_DEFAULTS.items():
            if output.get(name) == default:
                output.pop(name, None)
        if not output.get("auto_map"):
            output.pop("auto_map", None)
        return output


class LegacyEmoConfig(EmoConfig):
    """Reads `config.json` files of the legacy model type. The result is an `EmoConfig`.

    Example:

    ```python
    >>> from transformers import AutoConfig
    >>> import transformers_emo
    >>> AutoConfig.for_model("flex_olmo_noqknorm_prenorm").model_type
    'flex_olmo_noqknorm_prenorm'

    ```
    """

    model_type = LEGACY_MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Build an `EmoConfig` from the contents of a legacy `config.json`; see `EmoConfig.from_dict`."""
        return EmoConfig.from_dict(config_dict, **kwargs)


def _modernise(config_dict: dict[str, Any]) -> dict[str, Any]:
    """A copy of `config_dict` with the legacy model type and architecture renamed."""
    config_dict = dict(config_dict)
    if config_dict.get("model_type") == LEGACY_MODEL_TYPE:
        config_dict["model_type"] = EmoConfig.model_type
    if config_dict.get("architectures"):
        config_dict["architectures"] = [
            "EmoForCausalLM" if name == _LEGACY_ARCHITECTURE else name
            for name in config_dict["architectures"]
        ]
    return config_dict
