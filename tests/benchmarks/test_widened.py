"""A widened model computes what the small one computes."""

from pathlib import Path

import pytest
import torch
import widened
from tolerances import assert_same_numbers
from transformers_emo import EmoForCausalLM

ROOT = Path(__file__).parents[2]


@pytest.fixture
def widen(monkeypatch):
    for name, value in {"HIDDEN": 512, "WIDTH": 128, "HEADS": 4, "HEAD": 128}.items():
        monkeypatch.setattr(widened, name, value)
    return widened.widen


@torch.no_grad()
def test_its_logits_and_its_routing_are_those_of_the_small_model(widen, tmp_path):
    source = ROOT / "model_cards" / "emo-tiny"
    widen(source, tmp_path)
    small, wide = (EmoForCausalLM.from_pretrained(p, dtype=torch.float32) for p in (source, tmp_path))
    assert wide.model.layers[0].mlp.experts.down_proj.shape == (64, 512, 128)
    ids = torch.randint(2, 4096, (1, 24), generator=torch.Generator().manual_seed(0))
    ours, theirs = (model(ids, output_router_logits=True) for model in (wide, small))
    assert_same_numbers(ours.logits, theirs.logits)
    for one, two in zip(ours.router_logits, theirs.router_logits, strict=True):
        assert torch.equal(one.topk(4).indices, two.topk(4).indices)
