"""What a page shows: the data behind its figures, and the file that it becomes."""

import csv
import json
import re

import numpy as np
import pytest
from transformers_emo.analysis import Retention
from transformers_emo.analysis.page import html, page_content, write_page, write_pictures
from transformers_emo.analysis.page.orders import order_of_domains, order_of_experts


def test_maps_hold_the_mean_probabilities_in_the_order_shown(content, shown):
    table = shown[0].statistics.documents()
    rows = shown[0].statistics.layer_rows(0, 2).probability_NR
    found = content["models"][0]["maps"][2]
    for domain, values in zip(content["domains"], found["values"], strict=True):
        sums = rows[table["domain"] == domain].sum(0)
        np.testing.assert_allclose(values, (sums / sums.sum())[found["places"]], atol=6e-5)
    assert sorted(found["experts"]) == list(range(31))
    strongest = np.array(found["values"]).argmax(0)
    assert (np.diff(strongest) >= 0).all()  # blocks along the diagonal


def test_matrices_are_those_of_the_numbers(content, shown):
    order = [shown[1].numbers.domains.index(name) for name in content["domains"]]
    exact = shown[1].numbers.matrices["topic cosine"][np.ix_(order, order)]
    np.testing.assert_allclose(content["models"][1]["similar"]["cosine of mean routing"], exact, atol=6e-4)


def test_documents_are_shown_with_their_clusters_and_experts(content, shown):
    model, one = shown[0], content["models"][0]["shown"][3]
    place = int(np.flatnonzero(model.statistics.documents()["document"] == one["document"])[0])
    assert model.statistics.documents()["split"][place] == "test"
    assert len(one["pieces"]) == len(one["clusters"]) == len(one["picks"][0]) == 48
    tokens = model.statistics.tokens(0, ["document", "picks_1"])
    assert one["picks"][1] == tokens["picks_1"][tokens["document"] == one["document"]].tolist()
    assert sum(one["mean"][0]) == pytest.approx(1000, abs=16)


def test_the_cliff_is_where_the_mean_loss_has_risen_by_a_tenth(content):
    curves = {(c["model"], c["method"]): c for c in content["retention"]["curves"]}
    steep, flat = curves["twin", "layerwise"], curves["toy", "layerwise"]
    assert 0.5 < steep["cliff"] < 1 and 0.25 < flat["cliff"] < 0.5
    mean = content["retention"]["domains"][0]
    assert [point["rise"] for point in steep["points"][mean]] == [0.0, 0.3, 0.9]


def test_a_page_without_a_curve(shown, tmp_path):
    content = page_content(shown[:1], documents_per_domain=1)
    assert content["retention"] is None
    assert write_page(content, tmp_path / "page.html") < html.MOST_BYTES


def test_models_of_other_domains_are_refused(shown):
    import dataclasses

    other = dataclasses.replace(shown[1].numbers, domains=["a", "b"])
    with pytest.raises(ValueError, match="'twin' on .'a', 'b'.: measure all on the same texts"):
        page_content([shown[0], dataclasses.replace(shown[1], numbers=other)])
    with pytest.raises(ValueError, match="There is no model"):
        page_content([])


def test_the_file_is_whole_and_names_no_other_place(page_file, content):
    page = page_file.read_text()
    assert len(page_file.read_bytes()) < html.MOST_BYTES
    assert "<title>Toys &amp; &lt;twins&gt;</title>" in page
    data = re.search(r'<script type="application/json" id="content">(.*?)</script>', page, re.S)[1]
    assert json.loads(data) == content
    assert not re.search(r'<(?:link|script|img|iframe)[^>]+(?:src|href)="(?!data:)', page)


def test_no_document_ends_the_script_that_holds_it(content, tmp_path):
    nasty = "</script><!-- @library@ @program@ <script>alert(1)</script> \ud800"
    changed = json.loads(json.dumps(content))
    changed["models"][0]["shown"][0]["pieces"][0] = nasty
    write_page(changed, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "alert(1)</script>" not in page and page.count("<script") == page_count(content, tmp_path)
    data = re.search(r'id="content">(.*?)</script>', page, re.S)[1]
    assert json.loads(data)["models"][0]["shown"][0]["pieces"][0] == nasty.replace("\ud800", "?")


def page_count(content, tmp_path):
    write_page(content, tmp_path / "plain.html")
    return (tmp_path / "plain.html").read_text().count("<script")


def test_a_page_that_would_be_too_large_is_refused(content, tmp_path, monkeypatch):
    monkeypatch.setattr(html, "MOST_BYTES", 100_000)
    with pytest.raises(ValueError, match="at most 100,000 open well: show fewer documents"):
        write_page(content, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_pictures_come_with_their_data(content, tmp_path):
    files = write_pictures(content, tmp_path)
    assert {path.suffix for path in files} == {".png", ".svg", ".csv"}
    for path in files:
        start = path.read_bytes()[:5]
        assert path.suffix == ".csv" or start in (b"\x89PNG\r", b"<?xml")
    rows = list(csv.DictReader((tmp_path / "topics_or_words.csv").open()))
    exact = next(n for n in content["models"][1]["numbers"] if n["name"] == "token" and "layer" not in n)
    found = next(row for row in rows if row["model"] == "twin" and row["what is known"] == "token")
    assert float(found["share"]) == exact["value"]
    rows = list(csv.DictReader((tmp_path / "numbers.csv").open()))
    number = content["models"][1]["clusters"]["numbers"][0]
    found = next(
        row for row in rows if (row["model"], row["name"]) == ("twin", f"clusters: {number['name']}")
    )
    assert float(found["value"]) == pytest.approx(number["value"], rel=1e-5) and found["layer"] == ""
    layers = [n for model in content["models"] for n in model["numbers"] if "layer" in n]
    assert sum(row["layer"] != "" for row in rows) == len(layers)
    rows = list(csv.DictReader((tmp_path / "domains_by_experts.csv").open()))
    assert len(rows) == 2 * len(content["domains"]) * 31


def test_domains_that_are_alike_stand_together():
    group = np.array([0, 1, 2, 0, 1, 2, 0])
    alike = np.where(group[:, None] == group, 0.9, 0.1) + 0.1 * np.eye(7)
    ordered = group[order_of_domains(alike)]
    assert (np.diff(ordered) != 0).sum() == 2
    assert order_of_domains(np.eye(2)) == [0, 1]


def test_experts_stand_by_the_domain_that_wants_them_most():
    mean = np.array([[0.5, 0.1, 0.4], [0.2, 0.6, 0.2]])
    assert order_of_experts(mean, [1, 0]) == [1, 0, 2]


def test_curves_of_one_domain_alone(content, curve):
    domain = content["retention"]["domains"][1]
    alone = Retention([m for m in curve.measurements if m.domain == domain])
    point = content["retention"]["curves"][0]["points"][domain][1]
    assert point["loss"] == pytest.approx(alone.loss("toy", "layerwise", 0.5), abs=1e-4)
    assert point["experts"] == 16
