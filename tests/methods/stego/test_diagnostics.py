"""What is seen of STEGO without a label."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny import settings
from torch import nn

from lexiseg.errors import DataError
from lexiseg.methods.stego.diagnostics import (
    KINDS,
    Similarities,
    chosen_shifts,
    similarities,
    similarity_picture,
    similarity_table,
    table_lines,
    usage_picture,
)
from lexiseg.methods.stego.shifts import Shifts, suggest_shifts

HOW: dict[str, Any] = {"centring": "paper", "points": 3, "seed": 0}
SHIFTS = Shifts(0.3, 0.2, 0.5, reason=("one", "two", "three"))


class Maps:
    """In place of a store: features in memory."""

    def __init__(self, maps):
        self._maps = maps

    def __len__(self):
        return len(self._maps)

    def maps(self, pieces):
        return self._maps[torch.as_tensor(pieces)]


class Double(nn.Module):
    """Codes with the cosines of the features."""

    def forward(self, features):
        return 2 * features


def noise(count=6, *, channels=5) -> Any:
    return Maps(torch.randn(count, channels, 4, 5, generator=torch.Generator().manual_seed(3)))


def next_one(count):
    """Neighbours (N, 1): the following picture."""
    return ((torch.arange(count) + 1) % count)[:, None]


def loss_settings(**changes):
    return settings({f"stego.loss.{name}": value for name, value in changes.items()}).stego.loss


# ---- similarities ------------------------------------------------------------------------------------------------


def test_similarities_are_cosines_by_kind_of_pair():
    found = similarities(noise(), next_one(6), **HOW)
    assert tuple(found.features) == tuple(found.centred) == KINDS
    assert found.codes == {}
    assert found.means() == {}
    for kind in KINDS:
        values = found.features[kind]
        assert values.dtype == np.float32
        assert values.shape == (6, 9, 9)
        assert np.abs(values).max() <= 1 + 1e-5
        flat = values - values.mean(axis=2, keepdims=True)
        np.testing.assert_allclose(found.centred[kind], flat, atol=1e-6)
    # A point of a picture is itself at cosine 1; of another one it is not.
    np.testing.assert_allclose(np.diagonal(found.features["self"], axis1=1, axis2=2), 1, atol=1e-5)
    assert np.diagonal(found.features["neighbours"], axis1=1, axis2=2).max() < 0.999


def test_pairs_are_of_the_pictures_that_their_kind_says():
    """Pictures 0 and 1, 2 and 3, ... are constant and alike; all others are orthogonal to them."""
    channels = torch.eye(4).repeat_interleave(2, dim=0)
    store: Any = Maps(channels[:, :, None, None].expand(8, 4, 3, 3))
    twins = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])[:, None]
    found = similarities(store, twins, centring="none", points=2, seed=0)
    np.testing.assert_allclose(found.features["self"], 1, atol=1e-6)
    np.testing.assert_allclose(found.features["neighbours"], 1, atol=1e-6)
    by_pair = found.features["random"].reshape(8, -1)
    assert np.allclose(by_pair, by_pair[:, :1], atol=1e-6)  # constant pictures
    assert by_pair.mean() < 0.9  # a twin may be drawn, but not for all


def test_a_sample_follows_from_its_seed():
    first, again, other = (similarities(noise(), next_one(6), **{**HOW, "seed": seed}) for seed in (0, 0, 1))
    assert np.array_equal(first.features["random"], again.features["random"])
    assert not np.array_equal(first.features["random"], other.features["random"])


def test_codes_are_compared_at_the_same_points():
    scaled = similarities(noise(), next_one(6), **HOW, head=Double())
    for kind in KINDS:
        np.testing.assert_allclose(scaled.codes[kind], scaled.features[kind], atol=1e-5)
    means = scaled.means()
    assert list(means) == ["self_code", "knn_code", "random_code"]
    assert means["knn_code"] == pytest.approx(scaled.features["neighbours"].mean(), abs=1e-5)


def test_no_more_than_some_pairs_are_compared(monkeypatch):
    monkeypatch.setattr("lexiseg.methods.stego.diagnostics._PAIRS", 5)
    monkeypatch.setattr("lexiseg.methods.stego.diagnostics._TOGETHER", 2)
    found = similarities(noise(9), next_one(9), **HOW)
    assert [found.features[kind].shape for kind in KINDS] == [(5, 9, 9)] * 3


def test_one_picture_cannot_be_compared():
    with pytest.raises(DataError) as error:
        similarities(noise(1), next_one(1), **HOW)
    assert error.value.found == "one picture to compare"
    assert "at least two" in error.value.allowed
    assert "stego.features.five_crop: true" in error.value.fix


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("centring", ["paper", "code", "none"])
@pytest.mark.parametrize("rule", ["otsu", "quantile"])
def test_constant_features_give_finite_numbers(value, centring, rule):
    store: Any = Maps(torch.full((3, 4, 2, 2), value))
    found = similarities(store, next_one(3), **{**HOW, "centring": centring}, head=Double())
    for values in (*found.features.values(), *found.centred.values(), *found.codes.values()):
        assert np.isfinite(values).all()
    shifts = chosen_shifts(found, loss_settings(shifts=rule))
    assert np.isfinite([shifts.self_, shifts.knn, shifts.random]).all()
    lines = "\n".join(table_lines(similarity_table(found, shifts, limit=0.9)))
    assert "nan" not in lines
    assert ("they collapse" in lines) == (value == 1)
    assert similarity_picture(found, shifts).dtype == np.uint8


# ---- shifts ------------------------------------------------------------------------------------------------------


def two_groups():
    """Centred cosines: self pairs at -0.4 and 0.6, neighbours at -0.2 and 0.2, random ones from 0 to 0.99."""
    values = {
        "self": np.repeat(np.array([-0.4, 0.6], np.float32), 50),
        "neighbours": np.repeat(np.array([-0.2, 0.2], np.float32), 50),
        "random": np.arange(100, dtype=np.float32) / 100,
    }
    values = {kind: sample.reshape(1, 10, 10) for kind, sample in values.items()}
    return Similarities(features=values, centred=values)


def test_fixed_shifts_are_those_of_the_settings():
    found = chosen_shifts(
        two_groups(), loss_settings(shifts="fixed", self_shift=0.18, knn_shift=0.12, random_shift=0.46)
    )
    assert (found.self_, found.knn, found.random) == (0.18, 0.12, 0.46)
    assert found.reason == ("set in params.yaml",) * 3


@pytest.mark.parametrize("rule", ["otsu", "quantile"])
def test_rules_see_the_centred_cosines_of_each_kind(rule):
    given = two_groups()
    other = Similarities(features={kind: values * 0 for kind, values in given.features.items()}, centred=given.centred)
    found = chosen_shifts(other, loss_settings(shifts=rule))
    self_, knn, random = (torch.from_numpy(given.centred[kind]) for kind in KINDS)
    assert found == suggest_shifts(self_, knn, random, rule=rule)
    assert found.random == pytest.approx(0.98)
    if rule == "otsu":
        assert -0.45 < found.self_ < 0.6
        assert found.self_ != found.knn
    else:
        assert (found.self_, found.knn) == pytest.approx((-0.4, -0.2))  # what 70 % exceed lies in the lower group
    assert ["self" in found.reason[0], "neighbour" in found.reason[1], "random" in found.reason[2]] == [True] * 3


# ---- table and pictures ------------------------------------------------------------------------------------------


def with_codes(*, within, between):
    values = two_groups().features
    means = {"self": within, "neighbours": 0.25, "random": between}
    codes = {kind: np.full((1, 10, 10), value, np.float32) for kind, value in means.items()}
    return Similarities(features=values, centred=values, codes=codes)


def test_the_table_holds_quantiles_shifts_and_means():
    table = similarity_table(with_codes(within=0.5, between=0.125), SHIFTS, limit=0.85)
    assert list(table["quantiles"]) == ["features", "centred", "codes"]
    expected = {"0.05": 0.0495, "0.25": 0.2475, "0.5": 0.495, "0.75": 0.7425, "0.95": 0.9405}
    assert table["quantiles"]["centred"]["random"] == pytest.approx(expected)
    assert table["shifts"] == {
        "self": {"b": 0.3, "reason": "one"},
        "neighbours": {"b": 0.2, "reason": "two"},
        "random": {"b": 0.5, "reason": "three"},
    }
    assert table["code_means"] == {"self_code": 0.5, "knn_code": 0.25, "random_code": 0.125}
    assert table["collapsed"] is None


def test_the_table_without_a_head():
    table = similarity_table(two_groups(), SHIFTS, limit=0.85)
    assert list(table["quantiles"]) == ["features", "centred"]
    assert table["code_means"] == {}
    assert table["collapsed"] is None
    lines = table_lines(table)
    assert not any("collapse" in line for line in lines)
    assert lines[0].split() == ["cosines", "5", "%", "25", "%", "50", "%", "75", "%", "95", "%"]
    assert "shift b of neighbours pairs: 0.200 (two)" in lines


def test_the_table_as_lines():
    lines = table_lines(similarity_table(with_codes(within=0.5, between=0.125), SHIFTS, limit=0.85))
    values = ("0.05", "0.25", "0.49", "0.74", "0.94")
    assert lines[3] == f"{'features, random':<22}" + "".join(f"{value:>8}" for value in values)
    assert lines[-2] == "mean cosine of codes: self_code 0.50, knn_code 0.25, random_code 0.12"
    assert lines[-1] == "no sign of a collapse"
    assert {len(line) for line in lines[:10]} == {22 + 5 * 8}  # columns stand below each other
    collapsed = table_lines(similarity_table(with_codes(within=0.5, between=0.95), SHIFTS, limit=0.85))
    assert collapsed[-1].startswith("warning: codes of different pictures have a mean cosine of 0.95")


def test_the_picture_has_a_panel_for_codes_where_there_are_some():
    two, three = (similarity_picture(found, SHIFTS) for found in (two_groups(), with_codes(within=0.5, between=0.1)))
    assert three.shape[1] == pytest.approx(1.5 * two.shape[1], abs=2)
    moved = Shifts(0.3, 0.2, 0.7, reason=("", "", ""))
    changed = (similarity_picture(two_groups(), moved) != two).any(axis=(0, 2))
    assert changed.any()
    assert not changed[: len(changed) // 2].any()  # shifts are of the centred ones


def test_use_of_the_clusters_as_bars():
    assert not np.array_equal(usage_picture([0.5, 0.3, 0.2]), usage_picture([0.5, 0.2, 0.3]))
