"""The picture of the experts and the bars of the domains."""

import re

import torch
from transformers_emo.analysis.trying.heat_map import domain_bars, heat_map
from transformers_emo.subsets import DomainShare, RequestUsage


def test_a_cell_for_each_expert_that_is_held_and_a_frame_for_the_last_token():
    picks = torch.tensor([[0.0, 6.0, 1.0, 0.0], [2.0, 0.0, 0.0, 0.0], [0.0] * 4])
    last = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0] * 4, [0.0] * 4])
    page = heat_map(picks, last, [[0, 1, 2], [0, 3], []])
    assert re.findall(r"<title>(.*?)</title>", page) == [
        "layer 0, expert 1: 6 picks", "layer 0, expert 2: 1 pick", "layer 1, expert 0: 2 picks",
    ]  # fmt: skip
    assert re.findall(r'class="(c[1-6])"', page) == ["c6", "c1", "c4"]  # of its own layer's largest
    assert page.count('class="now"') == 1
    assert page.count("M") == 2  # in memory, not picked: expert 0 of layer 0, and 3 of layer 1
    assert "layer 2" not in page and "9 picks by 3 experts" in page


def test_bars_show_shares_beside_chance_and_names_are_text():
    usage = RequestUsage(5, {"<b>": DomainShare(0.5, 0.25), "other": DomainShare(0.1, 0.25)}, [])
    page = domain_bars(usage, num_domains=1)
    assert "&lt;b&gt;" in page and "50 %" in page and "width: 50.0%" in page and "left: 25.0%" in page
    assert "other" not in page
    assert "no library" in domain_bars(None)
