"""How a model is kept in few bits: a `quantization_config`, in files that of `compressed-tensors`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

from ..checkpoints.errors import CheckpointError
from ..imports.transformers_versions import private_names
from ..modeling_emo.kernels.packed.packed_weights import check_bits

with private_names("quantisation"):
    from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "emo-packed"
"""The name under which Transformers knows the quantiser of this package."""
ON_DISK = "compressed-tensors"
"""The name in files, by which other programs know the layout."""
_FORMAT = "pack-quantized"
_VERSION = "0.15.0"  # of compressed-tensors, from which on it reads all of this
_GROUPS = {8: -1, 4: 32}
_TARGETS = re.compile(
    r"(?:.*\.)?layers\.\d+\.(?:self_attn\.[qkvo]_proj\.weight|mlp\.(?:gate|up|down)_proj\.weight"
    r"|mlp\.experts\.(?:gate_up|down)_proj)|lm_head\.weight"
)
_HEAD = "re:.*lm_head$"
_ROUTERS = r"re:.*\.mlp\.gate$"


class PackedConfig(QuantizationConfigMixin):
    """Keep experts, attention, dense layers and the head in 8 or 4 bits; for `from_pretrained`.

    Weights are quantised one by one while they are read, of a whole model or of a subset of its experts
    (`expert_subset=`). Only weights are: activations keep the dtype of the model. Where no gradients are
    recorded, products on a CPU may round activations in bfloat16 to 8 bits, each 32 with a scale of their own
    (`packed_products`). Routers, norms and embeddings stay as they are, and so does a head that is tied to
    the embeddings. What `save_pretrained` then writes is the layout `pack-quantized` of `compressed-tensors`,
    which other programs read.

    Args:
        bits (`int`, defaults to 4): 8 or 4.
        group_size (`int`, *optional*): how many weights of a row share a scale; -1 for the whole row. It must
            divide the hidden size and the width of the experts. By default 32 with 4 bits, and -1 with 8.
        symmetric (`bool`, *optional*): without zero points. By default so with 8 bits, and not with 4: they
            take 0.25 bits a weight in groups of 32, and save a third of what 4 bits cost emo-tiny.
        head_bits (`int`, defaults to 8): 8 or 4 for the head, where 4 bits cost most.
        modules_to_not_convert (`Sequence[str]`, *optional*): modules that stay as they are, by name or by the
            end of it (`"lm_head"`, `"self_attn.v_proj"`), or by a regular expression after `re:`.

    Raises:
        ValueError: for other bits or group sizes.

    Example:

    ```python
    >>> from transformers import AutoModelForCausalLM
    >>> from transformers_emo import PackedConfig
    >>> model = AutoModelForCausalLM.from_pretrained(
    ...     "model_cards/emo-tiny", expert_subset="python", quantization_config=PackedConfig(bits=4)
    ... )
    >>> model.model.layers[0].mlp.experts.down_proj
    PackedTensor(shape=(16, 128, 64), dtype=torch.bfloat16, bits=4, group=32, with zero points)

    ```
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int | None = None,
        symmetric: bool | None = None,
        head_bits: int = 8,
        modules_to_not_convert: Sequence[str] | None = None,
        **kwargs: Any,
    ):
        kwargs.pop("quant_method", None)
        if kwargs:
            raise TypeError(f"PackedConfig() got an unexpected keyword argument {next(iter(kwargs))!r}.")
        check_bits(bits)
        check_bits(head_bits)
        group_size = _GROUPS[bits] if group_size is None else group_size
        if (
            isinstance(group_size, bool)
            or not isinstance(group_size, int)
            or (group_size != -1 and (group_size < 16 or group_size % 16))
        ):
            raise ValueError(
                f"group_size is {group_size!r}, expected a multiple of 16, or -1 for whole rows: give one, "
                "such as 32."
            )
        symmetric = bits == 8 if symmetric is None else symmetric
        if not isinstance(symmetric, bool):
            raise ValueError(f"symmetric is {symmetric!r}, expected True or False.")
        if isinstance(modules_to_not_convert, str):
            raise ValueError(
                f"modules_to_not_convert is {modules_to_not_convert!r}, expected a list of names: give one."
            )
        self.quant_method: Any = METHOD
        self.bits = bits
        self.group_size = group_size
        self.symmetric = symmetric
        self.head_bits = head_bits
        self.modules_to_not_convert = list(modules_to_not_convert or ())

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From what `to_dict` or `loading_dict` gave.

        Args:
            config_dict (`dict[str, Any]`): its contents.
            return_unused_kwargs (`bool`, defaults to `False`): return the other keyword arguments too.
            kwargs: settings that replace those of the file.

        Raises:
            CheckpointError: if a file asks for what this package cannot read.
        """
        config = (
            packing_of_dict(config_dict) if config_dict.get("quant_method") == ON_DISK else cls(**config_dict)
        )
        kwargs = config.update(**kwargs)
        return (config, kwargs) if return_unused_kwargs else config

    def keeps(self, module: str) -> bool:
        """Whether a module stays as it is.

        Args:
            module (`str`): its name.

        Example:

        ```python
        >>> from transformers_emo import PackedConfig
        >>> PackedConfig(modules_to_not_convert=["self_attn.v_proj"]).keeps("model.layers.0.self_attn.v_proj")
        True

        ```
        """
        for name in self.modules_to_not_convert:
            if name.startswith("re:"):
                if re.match(name[3:], module):
                    return True
            elif module == name or module.endswith(f".{name}"):
                return True
        return False

    def of(self, name: str) -> PackedConfig:
        """How one weight is kept: the head may have bits of its own.

        Args:
            name (`str`): its name.

        Example:

        ```python
        >>> from transformers_emo import PackedConfig
        >>> PackedConfig(bits=4).of("lm_head.weight").bits
        8

        ```
        """
        if self.head_bits == self.bits or not name.endswith("lm_head.weight"):
            return self
        return PackedConfig(self.head_bits, self.group_size, self.symmetric, self.head_bits)

    def group_of(self, inputs: int) -> int:
        """How many weights share a scale, of a row with so many.

        Args:
            inputs (`int`): the inputs of the weight.

        Raises:
            ValueError: if the group size does not divide them.

        Example:

        ```python
        >>> from transformers_emo import PackedConfig
        >>> PackedConfig(bits=8).group_of(2048)
        2048

        ```
        """
        group = inputs if self.group_size == -1 else self.group_size
        if inputs % group or group % (32 // self.bits):
            raise ValueError(
                f"A weight with {inputs} inputs cannot be kept in {self.bits} bits in groups of {group}: "
                "choose a `group_size` that divides it, such as 32."
            )
        return group

    def loading_dict(self) -> dict[str, Any]:
        """`dict[str, Any]`: what makes Transformers take the quantiser of this package."""
        return dict(vars(self))

    def to_dict(self) -> dict[str, Any]:
        """`dict[str, Any]`: what stands in `config.json`, as `compressed-tensors` writes it."""
        weights: dict[str, Any] = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "channel" if self.group_size == -1 else "group",
            "group_size": None if self.group_size == -1 else self.group_size,
            "block_structure": None,
            "dynamic": False,
            "actorder": None,
            "observer": "minmax",
            "observer_kwargs": {},
        }
        group = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
            "format": _FORMAT,
        }
        groups = {"group_0": group}
        if self.head_bits != self.bits:
            of_head = weights | {"num_bits": self.head_bits}
            groups["group_1"] = group | {"targets": [_HEAD], "weights": of_head}
        return {
            "quant_method": ON_DISK,
            "format": _FORMAT,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": [*self.modules_to_not_convert, _ROUTERS],
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            "version": _VERSION,
        }

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PackedConfig) and self.loading_dict() == other.loading_dict()

    def converts(self, name: str) -> bool:
        """Whether a parameter is to be packed.

        Args:
            name (`str`): its name in the network.

        Example:

        ```python
        >>> from transformers_emo import PackedConfig
        >>> config = PackedConfig(modules_to_not_convert=["lm_head"])
        >>> [config.converts(f"{name}.weight") for name in ("model.layers.0.self_attn.q_proj", "lm_head")]
        [True, False]

        ```
        """
        return _TARGETS.fullmatch(name) is not None and not self.keeps(name.rpartition(".")[0])

    def for_model(self, config: Any) -> Self:
        """The same for a model: a head that is tied to the embeddings stays as it is, as they do.

        Args:
            config (`EmoConfig`): the model's config.

        Example:

        ```python
        >>> from transformers_emo import EmoConfig, PackedConfig
        >>> PackedConfig().for_model(EmoConfig(tie_word_embeddings=True)).modules_to_not_convert
        ['lm_head']

        ```
        """
        if not config.tie_word_embeddings or self.keeps("lm_head"):
            return self
        skipped = [*self.modules_to_not_convert, "lm_head"]
        return type(self)(self.bits, self.group_size, self.symmetric, self.bits, skipped)


def packing_of(config: Any, label: str = "The model") -> PackedConfig | None:
    """How the weights of a model on disk are packed; `None` if they are not quantised.

    Args:
        config (`EmoConfig`): the model's config.
        label (`str`, *optional*): what the model is called in messages.

    Raises:
        CheckpointError: if they are quantised in another way.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig, PackedConfig
    >>> from transformers_emo.quantization.packed_config import packing_of
    >>> config = EmoConfig(quantization_config=PackedConfig(bits=8).to_dict())
    >>> packing_of(config).bits
    8

    ```
    """
    found = getattr(config, "quantization_config", None)
    if found is None or isinstance(found, PackedConfig):
        return found
    content = found if isinstance(found, Mapping) else found.to_dict()
    method = getattr(content.get("quant_method"), "value", content.get("quant_method"))
    if method == METHOD:
        return PackedConfig(**content)
    if method != ON_DISK:
        hint = ""
        if method == "torchao":
            hint = " (`quantised_experts` of earlier versions of this package wrote such models.)"
        raise CheckpointError(
            f"The weights of {label} are quantised by {method!r}, and this package reads {ON_DISK!r} only: "
            f"give the unquantised model, with `quantization_config=PackedConfig(...)` for fewer bits.{hint}"
        )
    try:
        return packing_of_dict(content)
    except CheckpointError as error:
        raise CheckpointError(f"{label}: {error}") from None


def refuse_quantised(config: Any, label: str) -> None:
    """Raise an error if the weights of a model are quantised, for what needs them as they are.

    Args:
        config (`EmoConfig`): the model's config.
        label (`str`): what the model is called in messages.

    Raises:
        CheckpointError: if they are.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.quantization.packed_config import refuse_quantised
    >>> refuse_quantised(EmoConfig(), "my-model")

    ```
    """
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(
            f"The weights of {label} are quantised, and are needed as they were: give the unquantised model. "
            "(`from_pretrained` quantises it while loading, with `quantization_config`.)"
        )


def packing_of_dict(content: Mapping[str, Any]) -> PackedConfig:
    """What the `quantization_config` of `compressed-tensors` says, if this package can read such weights.

    Args:
        content (`Mapping[str, Any]`): from `config.json`.

    Raises:
        CheckpointError: if it cannot: by the name and value of the setting.

    Example: see `packing_of`.
    """

    def refuse(what: str, value: Any, expected: str) -> CheckpointError:
        return CheckpointError(
            f"the quantised weights cannot be read: `{what}` is {value!r:.80}, expected {expected}. Give a "
            "model in the format pack-quantized with 8 or 4 bits, weights only, or the unquantised model."
        )

    for name in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        value = content.get(name)
        if value and not (isinstance(value, Mapping) and value.get("format") == "dense"):
            raise refuse(name, value, "none")
    if content.get("quantization_status", "compressed") != "compressed":
        raise refuse("quantization_status", content["quantization_status"], "'compressed'")
    groups = content.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise refuse("config_groups", groups, "groups of modules")
    schemes: list[tuple[int, int, bool]] = []
    heads: list[tuple[int, int, bool]] = []
    for group in groups.values():
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            raise refuse("config_groups", group, "a group that says how its weights are quantised")
        for name in ("input_activations", "output_activations"):
            if group.get(name):
                raise refuse(name, group[name], "none (activations that are not quantised)")
        form = group.get("format") or content.get("format")
        if form != _FORMAT:
            raise refuse("format", form, repr(_FORMAT))
        weights = group["weights"]
        for name, expected in (
            ("type", ("int", None)),
            ("num_bits", (4, 8)),
            ("strategy", ("group", "channel")),
            ("actorder", (None, False, "weight", "static")),
            ("dynamic", (False, None)),
        ):
            value = weights.get(name)
            value = getattr(value, "value", value)
            if not any(type(value) is type(each) and value == each for each in expected):
                raise refuse(name, value, " or ".join(repr(each) for each in expected if each is not None))
        size = -1 if weights["strategy"] == "channel" else weights.get("group_size")
        if not isinstance(size, int) or isinstance(size, bool):
            raise refuse("group_size", size, "a number")
        of_head = group.get("targets") in ([_HEAD], ["lm_head"])
        (heads if of_head else schemes).append((weights["num_bits"], size, weights.get("symmetric", True)))
    if len(set(schemes)) != 1 or len({kind[1:] for kind in (*schemes, *heads)}) != 1 or len(heads) > 1:
        raise refuse("config_groups", schemes + heads, "one kind of weights, but for the bits of the head")
    ignored = content.get("ignore") or []
    if not isinstance(ignored, list) or not all(isinstance(name, str) for name in ignored):
        raise refuse("ignore", ignored, "a list of names")
    try:
        bits, size, symmetric = schemes[0]
        kept = [name for name in ignored if name != _ROUTERS]
        return PackedConfig(bits, size, symmetric, heads[0][0] if heads else bits, kept)
    except ValueError as error:
        raise refuse("config_groups", schemes[0], f"what PackedConfig takes ({error})") from None
