"""Means, errors and the journal."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers_emo.analysis import Journal, Measurement, Retention
from transformers_emo.analysis.measurements import experts_at


def measurement(domain="a", method="global", share=0.5, seed=0, loss=(6.0, 3.0), tokens=(2, 1), **changes):
    fields = {"model": "emo", "num_experts": int(32 * share), "correct": [1] * len(loss)}
    return Measurement(
        domain=domain,
        method=method,
        share=share,
        seed=seed,
        loss=[*loss],
        tokens=[*tokens],
        **fields | changes,
    )


def test_means_are_over_domains_and_seeds_and_not_over_tokens():
    retention = Retention(
        [
            measurement("a", loss=(6.0, 3.0)),  # 3 nats a token
            measurement("b", loss=(50.0, 50.0), tokens=(50, 50)),  # 1
            measurement("a", seed=1, loss=(9.0, 6.0)),  # 5
            measurement("b", seed=1, loss=(150.0, 150.0), tokens=(50, 50)),  # 3
            measurement("a", seed=2, loss=(90.0, 6.0)),  # not measured on b: left out
        ]
    )
    assert retention.loss("emo", "global", 0.5) == pytest.approx((3 + 1 + 5 + 3) / 4)
    assert retention.loss_error("emo", "global", 0.5) == pytest.approx(np.std([2, 4], ddof=1))
    assert retention.accuracy("emo", "global", 0.5) == pytest.approx((2 / 3 + 2 / 100) / 2)
    assert (
        retention.loss("emo", "global", 0.25) is None and retention.loss_error("emo", "global", 0.25) is None
    )


def test_the_error_over_documents_is_that_of_resampling_them():
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 50, 400)
    loss = tokens * rng.normal(3, 1, 400)
    one = measurement(loss=loss.tolist(), tokens=tokens.tolist())
    means = []
    for _ in range(2000):
        drawn = rng.integers(0, 400, 400)
        means.append(loss[drawn].sum() / tokens[drawn].sum())
    assert one.loss_error == pytest.approx(np.std(means), rel=0.1)
    retention = Retention([one, measurement("b", loss=loss.tolist(), tokens=tokens.tolist())])
    assert retention.loss_error("emo", "global", 0.5) == pytest.approx(one.loss_error / np.sqrt(2))
    resampled = retention.resampled_loss("emo", "global", 0.5, num=2000)
    assert np.std(resampled) == pytest.approx(one.loss_error / np.sqrt(2), rel=0.1)
    assert np.mean(resampled) == pytest.approx(one.mean_loss, rel=0.01)


def test_one_document_has_no_error():
    assert measurement(loss=(3.0,), tokens=(1,)).loss_error is None
    assert measurement(loss=(3.0, 0.0), tokens=(1, 0)).loss_error is None
    assert Retention([measurement(loss=(3.0,), tokens=(1,))]).loss_error("emo", "global", 0.5) is None


def test_all_choices_see_the_same_resampled_documents():
    worse = [loss + 2 for loss in (6.0, 3.0)]
    retention = Retention([measurement(tokens=(1, 1)), measurement(share=0.25, loss=worse, tokens=(1, 1))])
    half, quarter = (retention.resampled_loss("emo", "global", share) for share in (0.5, 0.25))
    np.testing.assert_allclose(quarter - half, 2)
    assert set(half) == {6.0, 4.5, 3.0}
    with pytest.raises(ValueError, match="no measurement of 'emo' by 'reap'"):
        retention.resampled_loss("emo", "reap", 0.5)


@given(st.floats(0.001, 1), st.integers(1, 300), st.integers(1, 16))
def test_a_share_is_rounded_and_never_below_the_fewest_experts(share, available, least):
    number = experts_at(share, available, least)
    if number is None:
        assert share * available <= least - 1 or least > available
    else:
        assert least <= number <= available and abs(number - share * available) < 1
        nearest = abs(number - share * available) <= 0.5
        assert nearest or number == least


def test_measurements_are_read_back(tmp_path):
    journal = Journal(tmp_path / "out" / Journal.NAME)
    journal.require({"window": 256})
    kept = [measurement(), measurement("b"), measurement(method="full", share=1.0, seed=None)]
    for one in kept:
        journal.add(one)
    assert list(Journal(journal.path).measurements.values()) == kept
    assert Retention.read(tmp_path / "out").measurements == kept


def test_an_unfinished_line_is_replaced(tmp_path):
    journal = Journal(tmp_path / Journal.NAME)
    journal.add(measurement())
    with journal.path.open("a") as file:
        file.write('{"model": "em')
    again = Journal(journal.path)
    assert len(again.measurements) == 1
    again.add(measurement("b"))
    assert [m.domain for m in Journal(journal.path).measurements.values()] == ["a", "b"]


def test_other_settings_are_refused(tmp_path):
    journal = Journal(tmp_path / Journal.NAME)
    journal.require({"window": 256, "texts of a": "0a"})
    assert not journal.path.exists()  # nothing was measured with them yet
    journal.add(measurement())
    again = Journal(journal.path)
    again.require({"window": 256, "texts of b": "0b"})
    with pytest.raises(ValueError, match="measured with window = 256, and now it is 128"):
        again.require({"window": 128})


def test_files_that_hold_something_else_are_refused(tmp_path):
    (tmp_path / Journal.NAME).write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="line 1 is no measurement"):
        Journal(tmp_path / Journal.NAME)
    with pytest.raises(ValueError, match="no measurements in"):
        Retention.read(tmp_path / "elsewhere")
