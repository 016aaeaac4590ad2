"""How far two computations of the same numbers may lie apart, on any processor and in any order of sums.

A sum of n terms in a type of unit roundoff u is off by about sqrt(n) * u times its size: roundings are
independent of each other, so their squares add up (N. Higham and T. Mary, "A New Approach to Probabilistic
Rounding Error Analysis", SIAM Journal on Scientific Computing 41, 2019). From this comes the one tolerance of
these tests:

    slack * sqrt(terms) * u * scale

- `terms`: the lengths of all sums on the way to a number, one after another. In half precision sums are made
  in float32 and then rounded to be stored: there it is how often a number is stored on the way.
- `scale`: the size of what was added up; by default that of the largest number of the expected tensor, since
  a small one among large ones is a sum that cancelled.
- `slack`: both sides are rounded, and the worst of thousands of numbers lies several standard deviations out.
  (Measured over these tests, whatever the order of sums: no difference is more than a third of the
  tolerance.)

Bits are compared (`torch.equal`) only where both sides run the same code on the same shapes.
"""

from collections.abc import Iterable
from math import sqrt

import pytest
import torch
from conftest import TINY
from transformers_emo import EmoConfig

SLACK = 4
CLEAR = 50  # times the tolerance: numbers that lie so far apart are different ones on any processor


def network_terms(config: EmoConfig, length: int = 16) -> int:
    """The lengths of all sums between the embedding of one of `length` tokens and its logits."""
    width, heads = config.hidden_size, config.num_attention_heads
    norm = query = attended = router = gate = head = width
    attention = norm + query + width // heads + length + attended
    experts = norm + router + gate + config.intermediate_size + config.num_experts_per_tok
    return config.num_hidden_layers * (attention + experts) + norm + head


# Of the models of the fixture `make_model`; and of their gradients, which meet every product twice again.
NETWORK = network_terms(EmoConfig(**TINY))
TRAINING = 3 * NETWORK
# The size of their largest router logits. By what a logit is off, its probability is off relatively.
ROUTER_LOGIT = 8.0
# How often a number is stored on its way through those models. In each layer: two norms, query, rotation,
# scores, their softmax, attended, output, router, gate, up, their product, down, the sum of experts, two
# residual sums.
STORED = 3 * 16


def tolerance(
    expected: torch.Tensor,
    *,
    terms: int = NETWORK,
    dtype: torch.dtype | None = None,
    scale: float | None = None,
) -> float:
    """How far from each of the numbers `expected` another computation of them may be.

    Args:
        expected (`torch.Tensor`): of any shape.
        terms (`int`): the lengths of the sums on the way to them.
        dtype (`torch.dtype`, *optional*): in which they were computed, if not that of `expected`.
        scale (`float`, *optional*): the size of what was added up, if not that of the largest of `expected`.
    """
    if scale is None:
        finite = expected.detach()[expected.isfinite()].abs().double()
        scale = float(finite.max()) if len(finite) else 0.0
    return SLACK * sqrt(terms) * torch.finfo(dtype or expected.dtype).eps / 2 * scale


def assert_same_numbers(actual, expected, *, name: str = "", **settings) -> None:
    """The two are the same up to rounding. Tensors, numbers or sequences of them; settings of `tolerance`."""
    actual, expected = _tensor(actual), _tensor(expected)
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)} and {tuple(expected.shape)}"
    settings.setdefault("dtype", _coarser(actual, expected))
    _compare(actual, expected, tolerance(expected, **settings), name)


def _compare(actual: torch.Tensor, expected: torch.Tensor, atol: float, name: str) -> None:
    torch.testing.assert_close(
        actual.detach().double(), expected.detach().double(), atol=atol, rtol=0,
        msg=lambda text: f"{name}: {text}" if name else text,
    )  # fmt: skip


def assert_other_numbers(actual, expected, **settings) -> None:
    """Somewhere the two lie so far apart that no rounding explains it. Settings of `tolerance`."""
    actual, expected = _tensor(actual), _tensor(expected)
    settings.setdefault("dtype", _coarser(actual, expected))
    apart = float((actual.detach().double() - expected.detach().double()).abs().max())
    assert apart > CLEAR * tolerance(expected, **settings), f"the same up to rounding: at most {apart} apart"


def assert_same_scores(actual: list, expected: list) -> None:
    """The same scores of experts, layer by layer; `None` where a layer or an expert has none."""
    assert [layer is None for layer in actual] == [layer is None for layer in expected]
    for found, layer in zip(actual, expected, strict=True):
        if layer is not None:
            assert [score is None for score in found] == [score is None for score in layer]
            found, layer = (torch.tensor([s for s in scores if s is not None]) for scores in (found, layer))
            assert_same_numbers(found, layer, scale=ROUTER_LOGIT * float(layer.max()))


def same_number(expected: float, **settings):
    """To compare a float with, as `pytest.approx`. It was computed in float32, unless `dtype` says else."""
    settings.setdefault("dtype", torch.float32)
    return pytest.approx(expected, rel=0, abs=tolerance(torch.tensor(expected).double(), **settings))


def clear_words(model, *args, **kwargs) -> torch.Tensor:
    """`model.generate`, greedily, after a check that no rounding changes which token is the likeliest.

    Returns:
        `torch.Tensor`: (B, S), the ids.
    """
    kwargs |= {"return_dict_in_generate": True, "output_logits": True, "do_sample": False}
    out = model.generate(*args, **kwargs)
    assert_clear_choice(torch.stack(out.logits), terms=network_terms(model.config, out.sequences.shape[1]))
    return out.sequences


def assert_clear_choice(logits: torch.Tensor, k: int = 1, **settings) -> None:
    """The `k` largest of each row (..., N) are those also on other processors. Settings of `tolerance`."""
    best = logits.topk(k + 1).values.double()
    margin = float((best[..., k - 1] - best[..., k]).min())
    assert margin > CLEAR * tolerance(logits, **settings), f"choose other inputs: a margin of only {margin}"


def _tensor(numbers) -> torch.Tensor:
    if isinstance(numbers, torch.Tensor):
        return numbers
    if isinstance(numbers, Iterable):
        return torch.stack([_tensor(number) for number in numbers])
    return torch.tensor(numbers, dtype=torch.float32)


def _coarser(*tensors: torch.Tensor) -> torch.dtype:
    return max((tensor.dtype for tensor in tensors), key=lambda dtype: torch.finfo(dtype).eps)
