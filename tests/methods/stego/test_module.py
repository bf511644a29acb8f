"""A step of STEGO's trainings, and the alarm."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.tiny import settings
from torch import nn

from lexiseg.methods.stego.head import SegmentationHead
from lexiseg.methods.stego.module import CollapseAlarm, ProbeTraining, StegoTraining, collapsed
from lexiseg.methods.stego.probes import ClusterProbe
from lexiseg.methods.stego.shifts import Shifts
from lexiseg.training import fit

WHY = ("", "", "")
TERMS = ("self", "knn", "random")


def features(*, seed=0, size=3):
    return torch.randn(size, 6, 4, 4, generator=torch.Generator().manual_seed(seed))


def batch():
    return {"features": features(), "neighbours": features(seed=1)}


def training(*, shifts=(0.1, 0.1, 0.3), dropout=0.1, **loss) -> Any:
    torch.manual_seed(0)
    block = settings({f"stego.loss.{name}": value for name, value in loss.items()}).stego
    head = SegmentationHead(6, dim=4, dropout=dropout)
    return StegoTraining(head, loss=block.loss, train=block.train, shifts=Shifts(*shifts, reason=WHY))


def step(module, given=None):
    """The loss of one batch, its gradients, and what was logged."""
    logged = {}
    module.log_dict = logged.update
    torch.manual_seed(1)
    loss = module.training_step(given or batch(), 0)
    loss.backward()
    return loss.detach(), [weight.grad for weight in module.parameters()], logged


# ---- the head ----------------------------------------------------------------------------------------------------


def test_a_step_changes_the_head_and_nothing_else():
    module, given = training(), batch()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert before
    assert all(name.startswith("head.") for name in before)
    curve = fit(module, batch=lambda _: given, steps=1, seed=0)
    after = module.state_dict()
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert torch.equal(given["features"], features())
    assert torch.equal(given["neighbours"], features(seed=1))
    names = {"loss", *TERMS, "self_code", "knn_code", "random_code"}
    assert names <= set(curve[0])


def test_features_get_no_gradient():
    given = {name: value.requires_grad_() for name, value in batch().items()}
    module = training(dropout=0.0)
    module.head.requires_grad_(False)
    module.log_dict = lambda _: None
    # With a frozen head whatever is left is the codes' own dependence on the features.
    codes_alone = SegmentationHead.forward
    module.head.forward = lambda maps: codes_alone(module.head, maps.detach())
    assert not module.training_step(given, 0).requires_grad


def test_the_loss_is_the_weighted_sum_of_the_terms():
    loss, _, logged = step(training(self=0.5, knn=0.25, random=2.0))
    expected = 0.5 * logged["self"] + 0.25 * logged["knn"] + 2.0 * logged["random"]
    torch.testing.assert_close(loss, expected.detach())
    assert torch.equal(loss, logged["loss"].detach())


@pytest.mark.parametrize("left_out", TERMS)
def test_a_weight_of_0_leaves_a_term_out(left_out):
    """The shift of that term, which changes its gradient, then changes none."""

    def gradients(**loss):
        found = []
        for b in (0.1, 0.9):
            shifts = tuple(b if name == left_out else 0.2 for name in TERMS)
            found.append(torch.cat([grad.flatten() for grad in step(training(shifts=shifts, **loss))[1]]))
        return found

    low, high = gradients(**{left_out: 0.0})
    assert torch.equal(low, high)
    assert float(low.abs().sum()) > 0
    low, high = gradients()
    assert not torch.allclose(low, high)


def test_only_the_weights_of_the_terms_in_use_pull():
    """With the neighbours' term left out, what the neighbours are does not matter."""
    other = {**batch(), "neighbours": features(seed=7)}
    one, two = (step(training(knn=0.0, dropout=0.0), given)[0] for given in (batch(), other))
    torch.testing.assert_close(one, two)
    one, two = (step(training(dropout=0.0), given)[0] for given in (batch(), other))
    assert not torch.isclose(one, two)


def test_dropout_of_the_features_is_a_choice():
    """Without it the features' side of the loss is the same whatever the dropout; with it, it is drawn anew."""

    def seen(**loss):
        module = training(dropout=0.5, **loss)
        calls = []
        drop = module.head.drop
        module.head.drop = lambda maps: calls.append(maps) or drop(maps)
        step(module)
        return len(calls)

    assert seen(drop_features=True) == seen(drop_features=False) + 2


def test_the_loss_falls():
    module = training(dropout=0.0, drop_features=False, points=4)
    given = batch()
    curve = fit(module, batch=lambda _: given, steps=60, seed=0)
    losses = [row["loss"] for row in curve]
    assert losses[-1] < losses[0]


# ---- the alarm ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("within", "between", "found"),
    [
        (0.5, 0.1, None),
        (0.85, 0.85, None),
        (0.9, 0.1, "codes within a picture have a mean cosine of 0.90 (more than 0.85): they collapse"),
        (0.1, 0.95, "codes of different pictures have a mean cosine of 0.95"),
        (0.99, 0.95, "codes of different pictures have a mean cosine of 0.95"),
    ],
)
def test_codes_that_are_all_alike(within, between, found):
    said = collapsed({"self_code": within, "random_code": between}, limit=0.85)
    if found is None:
        assert said is None
    else:
        assert said is not None
        assert said.startswith(found)
        assert "stego.loss.random" in said
        assert "lexiseg stego diagnose" in said


def test_the_alarm_warns_once_and_not_at_the_start(capsys):
    alarm = CollapseAlarm(0.85, after=3)

    def end(index, *, between=0.95):
        metrics = {"self_code": torch.tensor(0.3), "random_code": torch.tensor(between)}
        trainer: Any = SimpleNamespace(callback_metrics=metrics)
        alarm.on_train_batch_end(trainer, training(), None, None, index)
        return capsys.readouterr().err

    assert end(2) == ""
    assert end(3, between=0.2) == ""
    assert "warning: codes of different pictures" in end(4)
    assert end(5) == ""


def test_the_alarm_rings_in_a_training(capsys):
    """Features that are all alike make codes that are all alike."""
    module = training(dropout=0.0)
    same = {name: torch.ones(3, 6, 4, 4) for name in ("features", "neighbours")}
    fit(module, batch=lambda _: same, steps=3, seed=0, callbacks=[CollapseAlarm(0.85, after=1)])
    assert capsys.readouterr().err.count("they collapse") == 1
    module = training(dropout=0.0)
    fit(module, batch=lambda _: batch(), steps=3, seed=0, callbacks=[CollapseAlarm(1.0, after=0)])
    assert "they collapse" not in capsys.readouterr().err


# ---- the probes --------------------------------------------------------------------------------------------------


def probes(*, clusters=True, linear=True):
    torch.manual_seed(0)
    head = SegmentationHead(6, dim=4, dropout=0.5)
    module = ProbeTraining(
        clusters=ClusterProbe(4, 3) if clusters else None,
        linear=nn.Conv2d(4, 2, 1) if linear else None,
        head=head,
        settings=settings().stego.probe,
    )
    return module, head


LABELLED = {"features": features(), "labels": torch.arange(3 * 64).view(3, 8, 8) % 3 - 1}


def test_probes_learn_and_codes_do_not():
    module, head = probes()
    assert {name.split(".")[0] for name in module.state_dict()} == {"clusters", "linear"}
    before = [{name: value.clone() for name, value in part.state_dict().items()} for part in (module, head)]
    curve = fit(module, batch=lambda _: LABELLED, steps=1, seed=0)
    after = [part.state_dict() for part in (module, head)]
    assert [name for name in before[0] if torch.equal(before[0][name], after[0][name])] == []
    assert [name for name in before[1] if not torch.equal(before[1][name], after[1][name])] == []
    assert not head.training  # no dropout
    assert {"cluster", "linear"} <= set(curve[0])


@pytest.mark.parametrize("alone", ["clusters", "linear"])
def test_a_probe_alone_learns_as_beside_the_other(alone):
    both, _ = probes()
    one, _ = probes(clusters=alone == "clusters", linear=alone == "linear")
    getattr(one, alone).load_state_dict(getattr(both, alone).state_dict())
    given = LABELLED if alone == "linear" else {"features": LABELLED["features"]}
    fit(both, batch=lambda _: LABELLED, steps=5, seed=0)
    curve = fit(one, batch=lambda _: given, steps=5, seed=0)
    for name, value in getattr(one, alone).state_dict().items():
        torch.testing.assert_close(value, getattr(both, alone).state_dict()[name])
    assert ("cluster" in curve[0], "linear" in curve[0]) == (alone == "clusters", alone == "linear")
