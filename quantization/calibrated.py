"""Few bits by text: numbers are rounded so that what a layer gives changes least, and not each number least.

Each matrix is rounded column by column. What a column is off by is made up for in the columns that are still
to come, as far as the inputs that the text gives the matrix allow (GPTQ, https://arxiv.org/abs/2210.17323).
The layers run in their order, each on what those before give in few bits. An expert sees only the tokens
that are routed to it, each as much as its weight says.

Shape suffixes: T tokens, D hidden size, E experts, N outputs, K inputs, G groups, g weights of a group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..checkpoints.errors import CheckpointError
from ..modeling_emo.kernels.packed.packed_tensor import PackedTensor
from ..modeling_emo.kernels.packed.packed_weights import PackedWeight, RoundedGroups, pack
from ..modeling_emo.modeling_emo import EmoMLP, EmoPreTrainedModel
from .packed_config import PackedConfig
from .quantizer import PackedQuantizer

_DAMPING = 0.01  # of the mean diagonal: as much as GPTQ's own
_LEAST = 0.05  # how much a weight counts whose input is always 0 in the text, of what one does in the mean
# The inputs of all tokens of a layer, as so large a share of an expert's own: few tokens may be routed to it.
_SHARED = 0.05
_FEW_TOKENS = 32
_AT_ONCE = 1 << 28  # bytes of the inputs' products of experts that are rounded together


@torch.no_grad()
def quantize_model(
    model: EmoPreTrainedModel,
    quantization_config: PackedConfig,
    input_ids: Iterable[torch.Tensor],
    *,
    attention_mask: Iterable[torch.Tensor] | None = None,
    progress: bool = True,
) -> EmoPreTrainedModel:
    """Quantise a loaded model, by text that is like what it will be used on.

    It then is as a model that was loaded with this `quantization_config`, but nearer to what it was: of what
    4 bits cost emo-tiny, more than half is saved. Some thousand tokens do, such as those that the experts
    were chosen on. It takes memory for the model, and for one layer's weights and inputs.

    Args:
        model (`EmoPreTrainedModel`): the model, full or a subset, in memory. It is changed, layer by layer.
        quantization_config (`PackedConfig`): how to keep it.
        input_ids (`Iterable[torch.Tensor]`): batches (B, S) of token ids.
        attention_mask (`Iterable[torch.Tensor]`, *optional*): a mask (B, S) for each batch, 0 for padding.
        progress (`bool`, defaults to `True`): show a progress bar.

    Returns:
        `EmoPreTrainedModel`: the model.

    Raises:
        ValueError: if there is no text, a group size does not fit, or the model is quantised, adapted or not
            in memory.
        CheckpointError: if a weight is not finite. The model is then quantised in part: load it again.

    Example:

    ```python
    >>> from transformers import AutoTokenizer
    >>> from transformers_emo import EmoForCausalLM, PackedConfig, quantize_model
    >>> model = EmoForCausalLM.from_pretrained("model_cards/emo-tiny", expert_subset="python")
    >>> tokenizer = AutoTokenizer.from_pretrained("model_cards/emo-tiny")
    >>> ids = tokenizer("import os\\n\\ndef main():", return_tensors="pt").input_ids
    >>> model = quantize_model(model, PackedConfig(bits=4), [ids], progress=False)
    >>> model.save_pretrained(tmp_path)

    ```
    """
    if not isinstance(model, EmoPreTrainedModel):
        raise ValueError(f"Got a {type(model).__name__}, expected an EMO model that is in memory.")
    packing = quantization_config.for_model(model.config)
    batches = _batches(model, input_ids, attention_mask)
    _check_model(model, packing)
    base: Any = model.base_model
    was_training = model.training
    model.eval()
    try:
        states = _FirstLayer.inputs(base, batches)
        layers = base.layers[: base.config.num_hidden_layers]
        for number, layer in enumerate(tqdm(layers, "Quantising", unit="layer", disable=not progress)):
            _quantise_layer(layer, f"model.layers.{number}", states, packing)
        head = getattr(model, "lm_head", None)
        if head is not None and packing.converts("lm_head.weight"):
            inputs = _Products()
            for state in states:
                inputs.add(state.counted(base.norm(state.hidden)))
            _round_linear(head, inputs.of_all(), packing, "lm_head.weight")
    finally:
        model.train(was_training)
    _mark(model, packing)
    return model


class _State:
    """The hidden states of a batch on their way, and what the layers get with them."""

    def __init__(self, hidden: torch.Tensor, kwargs: dict[str, Any], mask: torch.Tensor | None):
        self.hidden = hidden
        self.kwargs = kwargs
        self.mask = None if mask is None else mask.bool().flatten()

    def counted(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows (T, ...) of tokens that are no padding."""
        rows = tensor.reshape(-1, tensor.shape[-1])
        return rows if self.mask is None else rows[self.mask.to(rows.device)]

    def run(self, layer: nn.Module) -> torch.Tensor:
        output = layer(self.hidden, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output


class _FirstLayer(Exception):  # noqa: N818  it ends a forward and is no error
    """What the first layer of a forward got."""

    @classmethod
    def inputs(cls, base: Any, batches: list[tuple[torch.Tensor, torch.Tensor | None]]) -> list[_State]:
        states = []

        def stop(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            raise cls(args[0], kwargs)

        handle = base.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            for ids, mask in batches:
                try:
                    base(ids, attention_mask=mask, use_cache=False)
                except cls as found:
                    hidden, layer_kwargs = found.args
                    states.append(_State(hidden, layer_kwargs, mask))
        finally:
            handle.remove()
        return states


class _Products:
    """The sum of the inputs' products with each other, (K, K): of all tokens, or of each expert's."""

    def __init__(self) -> None:
        self.sum: torch.Tensor | None = None
        self.tokens = 0

    def add(self, rows_TK: torch.Tensor) -> None:
        rows_TK = rows_TK.float()
        product = rows_TK.T @ rows_TK
        self.sum = product if self.sum is None else self.sum + product
        self.tokens += len(rows_TK)

    def of_all(self) -> torch.Tensor:
        """(1, K, K)."""
        assert self.sum is not None
        return self.sum[None]


class _ExpertProducts:
    """The same for each expert of a layer: of what goes into `gate_up_proj`, and into `down_proj`."""

    def __init__(self, experts: Any):
        self.experts = experts
        shapes = experts.gate_up_proj.shape[-1], experts.down_proj.shape[-1]
        self.own = [torch.zeros(experts.num_experts, size, size) for size in shapes]
        self.all = [_Products(), _Products()]
        self.tokens = torch.zeros(experts.num_experts)

    def add(self, hidden_TD: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> None:
        experts = self.experts
        for expert in index_TK.unique().tolist():
            token, slot = torch.where(index_TK == expert)
            weight = weights_TK[token, slot, None].float()
            rows = hidden_TD[token]
            gate, up = F.linear(rows, experts.gate_up_proj[expert]).chunk(2, dim=-1)
            for part, inputs in enumerate((rows, experts.act_fn(gate) * up)):
                weighted = inputs.float() * weight
                self.own[part][expert] += (weighted.T @ weighted).to("cpu")
                self.all[part].add(weighted)
            self.tokens[expert] += len(token)

    def of_experts(self, part: int, experts: slice) -> torch.Tensor:
        """(E, K, K) of some experts, each with a share of all experts' inputs."""
        everyone = self.all[part]
        assert everyone.sum is not None
        share = _SHARED * self.tokens[experts].clamp(min=_FEW_TOKENS) / everyone.tokens
        return self.own[part][experts] + share[:, None, None] * everyone.sum.cpu()


def _batches(
    model: Any, input_ids: Any, attention_mask: Any
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    ids = [input_ids] if isinstance(input_ids, torch.Tensor) else list(input_ids)
    given = [attention_mask] if isinstance(attention_mask, torch.Tensor) else attention_mask
    masks = [None] * len(ids) if given is None else list(given)
    if not ids or len(masks) != len(ids):
        raise ValueError(
            f"Got {len(ids)} batches of `input_ids` and {0 if given is None else len(masks)} masks: give "
            "some batches, and a mask for each or none."
        )
    for batch, mask in zip(ids, masks, strict=True):
        if (
            not isinstance(batch, torch.Tensor)
            or batch.dim() != 2
            or batch.is_floating_point()
            or batch.numel() == 0
            or not 0 <= int(batch.min()) <= int(batch.max()) < model.config.vocab_size
            or (mask is not None and mask.shape != batch.shape)
        ):
            raise ValueError(
                f"A batch of `input_ids` is {batch!r:.100}: expected a tensor (B, S) of ids below "
                f"{model.config.vocab_size}, and a mask of its shape."
            )
    place = model.base_model.embed_tokens.weight.device
    return [
        (batch.to(place), None if mask is None else mask.to(place))
        for batch, mask in zip(ids, masks, strict=True)
    ]


def _check_model(model: Any, packing: PackedConfig) -> None:
    what = None
    if getattr(model.config, "quantization_config", None) is not None:
        what = "quantised already"
    elif any(hasattr(module, "base_layer") for module in model.modules()):
        what = "under adapters: merge or unload them first"
    for name, parameter in model.named_parameters():
        if parameter.is_meta or type(parameter.data) is not torch.Tensor:
            what = what or f"not in memory as it is ({name}): load it without offloading"
        elif packing.converts(name):
            packing.of(name).group_of(parameter.shape[-1])
    if what is not None:
        raise ValueError(f"The model cannot be quantised: it is {what}.")


def _quantise_layer(layer: Any, name: str, states: list[_State], packing: PackedConfig) -> None:
    """Round the weights of a layer, and let the states through it."""
    attention = layer.self_attn
    inputs, outputs = _Products(), _Products()
    with _watched(attention.q_proj) as queries, _watched(attention.o_proj) as attended:
        for state in states:
            state.run(layer)
            inputs.add(state.counted(queries.pop()[0]))
            outputs.add(state.counted(attended.pop()[0]))
    for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
        product = (outputs if part == "o_proj" else inputs).of_all()
        _round_linear(getattr(attention, part), product, packing, f"{name}.self_attn.{part}.weight")
    if isinstance(layer.mlp, EmoMLP):
        inputs, outputs = _Products(), _Products()
        with _watched(layer.mlp.up_proj) as entering, _watched(layer.mlp.down_proj) as leaving:
            for state in states:
                state.run(layer)
                inputs.add(state.counted(entering.pop()[0]))
                outputs.add(state.counted(leaving.pop()[0]))
        for part in ("gate_proj", "up_proj", "down_proj"):
            product = (outputs if part == "down_proj" else inputs).of_all()
            _round_linear(getattr(layer.mlp, part), product, packing, f"{name}.mlp.{part}.weight")
    else:
        experts = layer.mlp.experts
        products = _ExpertProducts(experts)
        with _watched(experts) as entering:
            for state in states:
                state.run(layer)
                products.add(*map(state.counted, entering.pop()))
        for number, part in enumerate(("gate_up_proj", "down_proj")):
            _round_experts(experts, part, number, products, packing, f"{name}.mlp.experts.{part}")
    for state in states:
        state.hidden = state.run(layer)


@contextmanager
def _watched(module: nn.Module) -> Iterator[list[tuple]]:
    """What a module is called with."""
    calls: list[tuple] = []
    handle = module.register_forward_pre_hook(lambda _, args: calls.append(args))
    try:
        yield calls
    finally:
        handle.remove()


def _round_linear(linear: Any, products: torch.Tensor, packing: PackedConfig, name: str) -> None:
    if packing.converts(name):
        weight = linear.weight
        rounded = _rounded(weight[None], products.to(weight.device), packing, name)
        linear.weight = PackedTensor(rounded.map(lambda part: part[0])).as_parameter()


def _round_experts(
    experts: Any, part: str, number: int, products: _ExpertProducts, packing: PackedConfig, name: str
) -> None:
    if not packing.converts(name):
        return
    weight = getattr(experts, part)
    step = max(_AT_ONCE // (weight.shape[-1] ** 2 * 4), 1)
    done = []
    for start in range(0, len(weight), step):
        some = slice(start, start + step)
        of_them = products.of_experts(number, some).to(weight.device)
        done.append(_rounded(weight[some], of_them, packing, name))
    parts = {kind: torch.cat([each.tensors[kind] for each in done]) for kind in done[0].tensors}
    whole = PackedWeight(parts["packed"], parts["scale"], parts.get("zero"), done[0].bits, done[0].group)
    setattr(experts, part, PackedTensor(whole).as_parameter())


def _rounded(weight: torch.Tensor, products: torch.Tensor, packing: PackedConfig, name: str) -> PackedWeight:
    """Matrices (E, N, K) rounded for inputs with these products (E, K, K)."""
    packing = packing.of(name)
    experts, outputs, inputs = weight.shape
    bits, group, most = packing.bits, packing.group_of(inputs), 2**packing.bits - 1
    if not bool(weight.isfinite().all()):
        raise CheckpointError(f"{name} cannot be quantised: it holds NaN or infinity. Get the model again.")
    left = weight.detach().float().clone()
    inverse = _inverse_root(products)
    squares = products.diagonal(dim1=-2, dim2=-1)  # of the inputs
    importance = (squares / squares.mean(-1, keepdim=True).clamp(min=1e-30) + _LEAST) / (1 + _LEAST)
    numbers = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scales = weight.new_empty(experts, outputs, inputs // group)
    zeros = torch.empty(scales.shape, dtype=torch.uint8, device=weight.device)
    for place, start in enumerate(range(0, inputs, group)):
        columns = slice(start, start + group)
        found = RoundedGroups.nearest_of(
            left[..., columns],
            bits,
            packing.symmetric,
            weight.dtype,
            importance=importance[:, None, columns],
        )
        scales[..., place], zeros[..., place] = found.scale.to(weight.dtype), found.zero.to(torch.uint8)
        errors = torch.empty(experts, outputs, group, device=weight.device)
        for column in range(start, start + group):
            value = left[..., column]
            number = (value / found.scale + found.zero).round_().clamp_(0, most)
            numbers[..., column] = number.to(torch.uint8)
            error = (value - (number - found.zero) * found.scale) / inverse[:, column, column, None]
            left[..., column : start + group] -= (
                error[..., None] * inverse[:, None, column, column : start + group]
            )
            errors[..., column - start] = error
        left[..., start + group :] -= errors @ inverse[:, columns, start + group :]
    zero = None if packing.symmetric else zeros
    return PackedWeight(pack(numbers, bits), scales, zero, bits, group)


def _inverse_root(products: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse, (E, K, K)."""
    products = products.double()
    diagonal = products.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    damped = products.clone()
    # An input that is always 0 does not matter: any number does.
    damped.diagonal(dim1=-2, dim2=-1).add_(_DAMPING * mean + (mean == 0))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()


def _mark(model: Any, packing: PackedConfig) -> None:
    """Let Transformers see what it would see after loading."""
    quantiser = PackedQuantizer(packing, pre_quantized=False)
    model.hf_quantizer = quantiser
    model.is_quantized = True
    model.quantization_method = packing.quant_method
    quantiser.postprocess_model(model)
