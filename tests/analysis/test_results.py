"""What is made of measurements: tables, claims, pictures."""

import csv
import json
import sys

import numpy as np
import pytest
from transformers_emo.analysis import (
    Measurement,
    Retention,
    claims,
    claims_text,
    cliff,
    markdown,
    plot_domains,
    plot_retention,
    write_csv,
    write_report,
)

# Mean loss by share: of EMO, of a standard model, and with random experts.
CURVES = {
    ("emo", "layerwise"): {1.0: 3.0, 0.5: 3.0, 0.25: 3.05, 0.125: 3.3},
    ("emo", "random"): {1.0: 3.0, 0.5: 3.4, 0.25: 4.0, 0.125: 4.6},
    ("std", "layerwise"): {1.0: 2.9, 0.5: 3.2, 0.25: 3.9, 0.125: 4.9},
    ("std", "random"): {1.0: 2.9, 0.5: 3.5, 0.25: 4.9, 0.125: 5.9},
}


def made(seeds=(0,), noise=0.0):
    """Measurements of two domains of four documents with these curves."""
    rng = np.random.default_rng(0)
    offsets = {domain: rng.normal(0, 0.2, 4) for domain in ("a", "b")}
    measurements = {}
    for (model, method), curve in CURVES.items():
        for share, loss in curve.items():
            for seed in seeds if share < 1 else (None,):
                for domain, offset in offsets.items():
                    own = rng.normal(0, noise, 4) if share < 1 else 0
                    m = Measurement(
                        model=model,
                        domain=domain,
                        method=method if share < 1 else "full",
                        share=share,
                        num_experts=int(32 * share),
                        seed=seed,
                        loss=((loss + offset - offset.mean() + own) * 10).tolist(),
                        correct=[4, 5, 3, 4],
                        tokens=[10] * 4,
                        num_experts_per_tok=8,
                        min_experts=4,
                    )
                    measurements[(model, domain, m.method, share, seed)] = m
    return Retention(measurements.values())


def test_csv_has_a_row_for_every_measurement(tmp_path):
    retention = made(seeds=(0, 1))
    write_csv(retention, tmp_path / "retention.csv")
    with (tmp_path / "retention.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(retention.measurements) == 2 * 2 * (1 + 2 * 3 * 2)
    full = [row for row in rows if row["method"] == "full"]
    assert all(row["seed"] == "" and row["share"] == "1" and row["num_experts"] == "32" for row in full)
    row = next(
        row for row in rows if row["model"] == "std" and row["share"] == "0.125" and row["seed"] == "1"
    )
    assert float(row["loss"]) == pytest.approx(4.9) and float(row["accuracy"]) == 0.4
    assert (row["method"], row["domain"], row["tokens"], row["documents"]) == ("layerwise", "a", "40", "4")


def test_markdown_has_losses_errors_and_shares_that_are_impossible():
    text = markdown(made(), shares=[0.5, 0.25, 0.125, 0.0625])
    assert "| model | chosen by | 100 % | 50 % | 25 % | 12.5 % | 6.25 % |" in text
    assert "| emo | *experts kept* | 32 | 16 | 8 | 4 | – |" in text
    cells = next(line for line in text.splitlines() if line.startswith("| std | layerwise | 2.900")).split(
        " | "
    )
    assert cells[4].startswith("3.900 ± ") and cells[4].endswith(" (+1.000)") and cells[6] == "– |"
    assert "std has no 6.25 % of its 32 experts: a subset keeps at least 4." in text
    assert "At 12.5 % a token of std takes all that are kept, not 8." in text
    assert "standard error over documents" in text and "| emo | layerwise | 40.0 % | " in text
    assert "| a | emo | 3.000 | 3.000 | 3.050 | 3.300 | – |" in text


def test_markdown_of_several_seeds_has_their_deviation():
    retention = made(seeds=(0, 1, 2), noise=0.1)
    text = markdown(retention)
    error = retention.loss_error("std", "layerwise", 0.25)
    assert "standard deviation over 3 seeds" in text
    assert f"± {error:.3f} (" in text and "| 2.900 |" in text  # all experts: no seed, no deviation


def test_cliffs_are_interpolated_in_the_logarithm_of_the_share():
    retention = made()
    assert cliff(retention, "std", "layerwise", 0.3) == pytest.approx(0.5)
    assert cliff(retention, "std", "layerwise", 0.65) == pytest.approx(0.25 * 2**0.5)
    assert cliff(retention, "emo", "layerwise", 0.05) == pytest.approx(0.25)
    assert cliff(retention, "emo", "layerwise", 0.175) == pytest.approx(0.125 * 2**0.5)
    assert cliff(retention, "emo", "layerwise", 0.31) is None
    with pytest.raises(ValueError, match="a number above 0"):
        cliff(retention, "emo", "layerwise", 0.0)
    with pytest.raises(ValueError, match="'reap' were not both measured"):
        cliff(retention, "emo", "reap", 0.1)


def test_claims_are_the_numbers_of_the_curves():
    found = claims(made(), baseline="std")
    emo, std = found["models"]["emo"], found["models"]["std"]
    assert emo["full_loss"] == pytest.approx(3.0) and emo["full_accuracy"] == pytest.approx(0.4)
    assert emo["methods"]["layerwise"]["rise"]["0.25"]["value"] == pytest.approx(0.05)
    assert emo["methods"]["layerwise"]["rise_over_random"]["0.125"]["value"] == pytest.approx(0.3 / 1.6)
    assert std["methods"]["layerwise"]["cliff"]["0.5"] == cliff(made(), "std", "layerwise", 0.5)
    assert "rise_over_random" in std["methods"]["random"] and not std["methods"]["random"]["rise_over_random"]
    against = found["against"]["emo"]
    assert list(found["against"]) == ["emo"] and against["baseline"] == "std"
    assert against["full_gap"]["value"] == pytest.approx(3.0 / 2.9 - 1)
    assert against["rise_ratio"]["layerwise"]["0.25"]["value"] == pytest.approx(0.05)
    assert against["rise_ratio"]["layerwise"]["0.125"]["value"] == pytest.approx(0.15)


def test_intervals_hold_the_value_and_are_paired():
    # All documents rise alike, so that resampling them changes the losses and not the rise.
    rise = claims(made())["models"]["emo"]["methods"]["layerwise"]["rise"]["0.25"]
    assert rise["low"] == pytest.approx(rise["high"]) == pytest.approx(0.05)
    noisy = claims(made(noise=0.1), baseline="std")
    for interval in (
        noisy["models"]["emo"]["methods"]["layerwise"]["rise"]["0.125"],
        noisy["against"]["emo"]["rise_ratio"]["layerwise"]["0.125"],
    ):
        assert interval["low"] < interval["value"] < interval["high"]


def test_there_is_no_ratio_to_a_rise_that_may_be_zero():
    found = claims(made(), shares=(0.5,), baseline="emo")
    assert found["against"]["std"]["rise_ratio"]["layerwise"]["0.5"] is None
    assert "| layerwise | – |" in claims_text(found)


def test_claims_without_some_measurements():
    retention = Retention([m for m in made().measurements if m.model == "emo" and m.method != "random"])
    found = claims(retention, shares=(0.25, 0.0625))
    assert found["against"] == {} and list(found["models"]["emo"]["methods"]["layerwise"]["rise"]) == ["0.25"]
    with pytest.raises(ValueError, match="no model 'std'"):
        claims(retention, baseline="std")


def test_the_text_has_the_claims():
    text = claims_text(claims(made(), baseline="std"))
    row = next(line for line in text.splitlines() if line.startswith("| emo | layerwise |"))
    assert (
        "+0.050 [+0.050, +0.050]" in row
        and "| 0.050 |" in row
        and "| 25.0 % |" in row
        and row.endswith("– |")
    )
    assert (
        "emo against std. The loss of the full model is +3.4 [" in text
        and "| layerwise | 1/20.0: 0.050 [" in text
    )


def test_pictures_are_drawn(tmp_path):
    from matplotlib.image import imread

    retention = made(seeds=(0, 1), noise=0.1)
    plot_retention(retention, tmp_path / "retention.png")
    plot_domains(retention, tmp_path / "domains.png")
    for name in ("retention.png", "domains.png"):
        pixels = imread(tmp_path / name)
        assert min(pixels.shape[:2]) > 300
        assert (pixels[0, 0, :3] == 1).all() and (pixels[..., 3] == 1).all()  # white of its own, on any page
        assert len(np.unique(pixels.reshape(-1, 4), axis=0)) > 50


def test_pictures_need_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="`pip install 'matplotlib"):
        plot_retention(made(), tmp_path / "retention.png")


def test_reports_are_whole(tmp_path):
    summary = write_report(made(), tmp_path, baseline="std")
    expected = {"claims.json", "retention.csv", "retention.md", "retention.png", "retention_domains.png"}
    assert {path.name for path in tmp_path.iterdir()} == expected
    assert json.loads((tmp_path / "claims.json").read_text()) == claims(made(), baseline="std")
    assert "| emo | layerwise | 3.000" in summary and "emo against std" in summary
    assert (tmp_path / "retention.md").read_text().count("| emo | layerwise |") == 3


def test_a_method_that_one_model_lacks_has_no_row_there():
    retention = made()
    whole = [m for m in retention.measurements if m.model == "emo" or m.method in ("full", "layerwise")]
    part = Retention(whole)
    assert "random" in part.methods_of("emo") and part.methods_of("std") == ["layerwise"]
    text, found = markdown(part), claims(part, baseline="std")
    assert "| emo | random |" in text and "| std | random |" not in text
    assert "random" not in found["models"]["std"]["methods"]
    assert Retention([m for m in whole if m.method == "full"]).methods_of("std") == []
