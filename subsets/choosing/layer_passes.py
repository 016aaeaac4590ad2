"""Running a model layer by layer over all calibration batches, and scoring its experts meanwhile.

The model's own modules run, with the masks that Transformers makes. So the numbers are those of the model.

Shape suffixes: B batch, S sequence, T tokens that are no padding, D hidden size, E experts of a layer, K
experts taken per token, P = T * K picks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.masking_utils import create_causal_mask

from ...configuration import EmoConfig
from ...modeling_emo.transformers_differences import CACHE
from .calibration_batches import Batch
from .hidden_states import HiddenStates
from .layer_sources import Layers, device_of
from .scores import ExpertOutput, RouterProbability

# For so many tokens at a time the outputs of single experts are in memory: K rows for each token.
_OUTPUT_TOKENS = 1024

Scores = list[RouterProbability | ExpertOutput | None]


@torch.no_grad()
def pass_full_model(
    layers: Layers, batches: Sequence[Batch], scores: Scores, states: HiddenStates, bar: tqdm
) -> None:
    """Run every layer with all of its experts, and add the batches to the scores.

    The experts of the last layer run only if the scores need their outputs. Nothing runs after the last layer
    with experts.

    Args:
        layers (`Layers`): the model.
        batches (`Sequence[Batch]`): calibration text.
        scores (`list`): the score object of each layer, `None` for a dense layer.
        states (`HiddenStates`): holds the hidden states between layers.
        bar (`tqdm`): the progress bar. It counts layers times batches.

    Example:

    ```python
    >>> import torch
    >>> from tqdm import tqdm
    >>> from transformers_emo import EmoModel
    >>> from transformers_emo.subsets.choosing.calibration_batches import ready_batches
    >>> from transformers_emo.subsets.choosing.hidden_states import HiddenStates
    >>> from transformers_emo.subsets.choosing.layer_sources import LoadedLayers
    >>> from transformers_emo.subsets.choosing.scores import new_score
    >>> from transformers_emo.subsets.choosing.layer_passes import pass_full_model
    >>> layers = LoadedLayers(EmoModel.from_pretrained("model_cards/toy-emo"))
    >>> scores = [new_score("global", layer) for layer in layers.config.layer_experts]
    >>> batches = ready_batches([torch.tensor([[5, 6, 7]])])
    >>> pass_full_model(layers, batches, scores, HiddenStates(1e9), tqdm(disable=True))
    >>> round(float(scores[0].result()[:31].sum()), 6)
    1.0

    ```
    """
    for number, batch in enumerate(batches):
        states[number] = layers.embed(batch.input_ids)
    last = _last_with_experts(layers.config)
    for index, layer in enumerate(layers.config.layer_experts[: last + 1]):
        decoder, experts, score = layers.decoder(index), None, scores[index]
        if not layer.is_dense and (index < last or isinstance(score, ExpertOutput)):
            experts, _ = layers.experts(index, range(layer.num_experts))
        for number, batch in enumerate(batches):
            hidden_BSD = _attend(layers, decoder, states.pop(number), batch)
            states[number] = _run_full_block(decoder, experts, score, layers.mask(index), hidden_BSD, batch)
            bar.update()
        experts = None  # freed before the next layer is read


def _run_full_block(decoder, experts, score, mask, hidden_BSD, batch) -> torch.Tensor:
    x_TD = decoder.pre_feedforward_layernorm(_text_of(hidden_BSD, batch))
    if score is None:
        output_TD, _ = decoder.mlp(x_TD)
    else:
        weight_T = batch.weight[batch.attention_mask]
        logits_TE, weights_TK, index_TK, _ = decoder.mlp.gate(x_TD, mask)
        if isinstance(score, RouterProbability):
            score.add_logits(_masked(logits_TE, mask), weight_T)
            if experts is None:
                return hidden_BSD
            output_TD = experts(x_TD, index_TK, weights_TK)
        else:
            output_TD, norm_TK = _run_each_expert(experts, x_TD, index_TK, weights_TK)
            score.add_outputs(x_TD, output_TD, index_TK, weights_TK, norm_TK, weight_T)
    return _add_to_text(hidden_BSD, output_TD, batch)


def _run_each_expert(experts, x_TD, index_TK, weights_TK) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of all experts together (T, D), and the norm of each expert's output (T, K), float32."""
    outputs, norms = [], []
    for part in torch.arange(len(x_TD), device=x_TD.device).split(_OUTPUT_TOKENS):
        index_tK, top_k = index_TK[part], index_TK.shape[1]
        # Every pick is made a token of its own with weight 1. So any implementation of the experts, also with
        # adapters, gives the outputs one by one.
        x_PD = x_TD[part].repeat_interleave(top_k, dim=0)
        output_PD = experts(x_PD, index_tK.reshape(-1, 1), torch.ones_like(weights_TK[part]).reshape(-1, 1))
        output_tKD = output_PD.view(len(part), top_k, -1)
        norms.append(torch.linalg.vector_norm(output_tKD, dim=-1, dtype=torch.float32))
        outputs.append((output_tKD * weights_TK[part][..., None]).sum(1).to(x_TD.dtype))
    if not outputs:
        return x_TD, weights_TK.float()
    return torch.cat(outputs), torch.cat(norms)


@torch.no_grad()
def pass_layerwise(
    layers: Layers,
    batches: Sequence[Batch],
    sizes: Sequence[int],
    pick: Callable[[int, torch.Tensor, int], list[int]],
    states: HiddenStates,
    bar: tqdm,
) -> list[tuple[list[torch.Tensor | None], list[list[int] | None]]]:
    """Choose layer by layer, on the hidden states that come from the experts chosen in the layers before.

    The router of a layer depends on its own attention and on the chosen experts of the layers before. So all
    layers are chosen in one pass, and an expert that is not chosen never runs. (The authors run the whole
    model again for every layer.) With several sizes, the layers up to the first choice run once, and each
    layer is read once.

    Args:
        layers (`Layers`): the model.
        batches (`Sequence[Batch]`): calibration text.
        sizes (`Sequence[int]`): how many experts to keep, for each choice.
        pick (`Callable`): gets a layer, its scores (E,) and a size, and returns the experts to keep.
        states (`HiddenStates`): holds the hidden states between layers.
        bar (`tqdm`): the progress bar. It counts layers times batches times sizes.

    Returns:
        `list`: for each size the scores (E,) and the kept experts of each layer, in the layer's own
        numbering; `None` for dense layers.

    Example:

    ```python
    >>> import torch
    >>> from tqdm import tqdm
    >>> from transformers_emo import EmoModel
    >>> from transformers_emo.subsets.choosing.calibration_batches import ready_batches
    >>> from transformers_emo.subsets.choosing.hidden_states import HiddenStates
    >>> from transformers_emo.subsets.choosing.layer_sources import LoadedLayers
    >>> from transformers_emo.subsets.choosing.layer_passes import pass_layerwise
    >>> layers = LoadedLayers(EmoModel.from_pretrained("model_cards/toy-emo"))
    >>> batches = ready_batches([torch.tensor([[5, 6, 7]])])
    >>> best = lambda layer, scores_E, size: scores_E.topk(size).indices.sort().values.tolist()
    >>> [(scores, kept)] = pass_layerwise(layers, batches, [8], best, HiddenStates(1e9), tqdm(disable=True))
    >>> [len(ids) for ids in kept]
    [8, 8, 8, 8]

    ```
    """
    num_layers = layers.config.num_hidden_layers
    scores: list[list[torch.Tensor | None]] = [[None] * num_layers for _ in sizes]
    kept: list[list[list[int] | None]] = [[None] * num_layers for _ in sizes]
    streams = {0: list(range(len(sizes)))}  # which choices have these hidden states in common
    for number, batch in enumerate(batches):
        states[0, number] = layers.embed(batch.input_ids)
    last = _last_with_experts(layers.config)
    for index, layer in enumerate(layers.config.layer_experts[: last + 1]):
        decoder = layers.decoder(index)
        for stream, choices in streams.items():
            score = None if layer.is_dense else RouterProbability(layer)
            for number, batch in enumerate(batches):
                hidden_BSD = _attend(layers, decoder, states.pop((stream, number)), batch)
                if score is None:
                    hidden_BSD = _run_full_block(decoder, None, None, None, hidden_BSD, batch)
                else:
                    x_TD = decoder.pre_feedforward_layernorm(_text_of(hidden_BSD, batch))
                    logits_TE = _masked(decoder.mlp.gate(x_TD)[0], layers.mask(index))
                    score.add_logits(logits_TE, batch.weight[batch.attention_mask])
                states[stream, number] = hidden_BSD
                bar.update(len(choices))
            if score is not None:
                for choice in choices:
                    scores[choice][index] = score.result()
                    kept[choice][index] = pick(index, score.result(), sizes[choice])
        if layer.is_dense or index == last:
            continue
        kept_here = [ids[index] or [] for ids in kept]
        experts, held = layers.experts(index, sorted({e for ids in kept_here for e in ids}))
        masks = [_mask_of(ids, layer.num_experts) for ids in kept_here]
        for stream, choices in streams.items():
            for number, batch in enumerate(batches):
                hidden_BSD = states.pop((stream, number))
                for choice in choices:
                    states[choice, number] = _run_kept(
                        decoder, experts, held, masks[choice], hidden_BSD, batch
                    )
        streams = {choice: [choice] for choice in range(len(sizes))}
        experts = None  # freed before the next layer is read
    return list(zip(scores, kept, strict=True))


def _attend(layers: Layers, decoder: Any, hidden_BSD: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The first half of a layer, as in `EmoDecoderLayer.forward`."""
    hidden_BSD = hidden_BSD.to(device_of(decoder.pre_attention_layernorm, hidden_BSD.device))
    position_ids = torch.arange(hidden_BSD.shape[1], device=hidden_BSD.device)[None]
    causal_mask = create_causal_mask(
        config=layers.config,
        inputs_embeds=hidden_BSD,
        attention_mask=batch.attention_mask.to(hidden_BSD.device),
        position_ids=position_ids,
        **{CACHE: None},
    )
    attended_BSD, _ = decoder.self_attn(
        hidden_states=decoder.pre_attention_layernorm(hidden_BSD),
        attention_mask=causal_mask,
        position_ids=position_ids,
        position_embeddings=layers.rotary(hidden_BSD, position_ids),
    )
    return hidden_BSD + attended_BSD


def _run_kept(decoder, experts, held, mask, hidden_BSD: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The second half of a layer with the experts of a mask, for tokens that are no padding."""
    hidden_BSD = hidden_BSD.to(device_of(decoder.pre_feedforward_layernorm, hidden_BSD.device))
    x_TD = decoder.pre_feedforward_layernorm(_text_of(hidden_BSD, batch))
    # The whole router with a mask, also if only some experts were read. In a low precision its products
    # depend on how many rows it has.
    _, weights_TK, index_TK, _ = decoder.mlp.gate(x_TD, mask)
    if len(held) < len(decoder.mlp.gate.weight):
        # Picks of experts that are not in the stack have weight 0: they may point to any row.
        row_E = index_TK.new_zeros(len(decoder.mlp.gate.weight))
        row_E[torch.tensor(held, device=row_E.device)] = torch.arange(len(held), device=row_E.device)
        index_TK = row_E[index_TK]
    return _add_to_text(hidden_BSD, experts(x_TD, index_TK, weights_TK), batch)


def _text_of(hidden_BSD: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The hidden states of the tokens that are no padding, (T, D)."""
    if batch.attention_mask.all():
        return hidden_BSD.flatten(0, 1)
    return hidden_BSD[batch.attention_mask.to(hidden_BSD.device)]


def _add_to_text(hidden_BSD: torch.Tensor, output_TD: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The hidden states, with an output added for the tokens that are no padding."""
    if batch.attention_mask.all():
        return hidden_BSD + output_TD.view_as(hidden_BSD)
    result_BSD = hidden_BSD.clone()
    result_BSD[batch.attention_mask.to(hidden_BSD.device)] += output_TD
    return result_BSD


def _masked(logits_TE: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Router logits, with minus infinity for experts that the model does not use."""
    if mask is None:
        return logits_TE
    return logits_TE.masked_fill(~mask.to(logits_TE.device), float("-inf"))


def _mask_of(kept: Sequence[int], num_experts: int) -> torch.Tensor | None:
    if len(kept) == num_experts:
        return None
    return torch.zeros(num_experts, dtype=torch.bool).index_fill_(0, torch.tensor(kept), True)


def _last_with_experts(config: EmoConfig) -> int:
    return max((i for i, layer in enumerate(config.layer_experts) if not layer.is_dense), default=-1)
