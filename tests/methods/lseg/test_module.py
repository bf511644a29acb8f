from types import SimpleNamespace

import pytest
import torch
from helpers.tiny import settings, small_vit
from torch import nn

from lexiseg.encoders.pyramid import VitBackbone
from lexiseg.methods.lseg.model import LSeg
from lexiseg.methods.lseg.module import LSegTraining
from lexiseg.methods.lseg.regularisation import SpatialRegularisation

# The recipe of the released script: base rate 0.004 for the backbone, ten times as much for the rest.
PAPER = {
    "optimiser": "sgd",
    "lr": 0.04,
    "lr_batch": 16,
    "backbone_lr_factor": 0.1,
    "weight_decay": 1e-4,
    "schedule": "poly",
    "schedule_unit": "epoch",
    "batch": 4,
}


def training(*, steps=12, steps_per_epoch=3, **changes):
    blocks = SpatialRegularisation("bottleneck", depth=2, activation="lrelu")
    backbone = VitBackbone(small_vit(), readout="project")
    model = LSeg(backbone, text_dim=6, features=8, temperature=0.07, regularisation=blocks)
    recipe = settings({f"lseg.train.{key}": value for key, value in changes.items()}).lseg.train
    text = nn.functional.normalize(torch.randn(3, 6), dim=1)
    return LSegTraining(model, text=text, settings=recipe, steps=steps, steps_per_epoch=steps_per_epoch)


def test_groups_of_the_paper():
    module = training(**PAPER)
    optimiser = module.configure_optimizers()["optimizer"]
    assert type(optimiser) is torch.optim.SGD
    slow, fast = optimiser.param_groups
    # scaled by the batch of one device over 16
    assert slow["lr"] == pytest.approx(0.004 * 4 / 16)
    assert fast["lr"] == pytest.approx(0.04 * 4 / 16)
    for group in (slow, fast):
        assert (group["momentum"], group["weight_decay"]) == (0.9, 1e-4)
    names = {id(value): name for name, value in module.model.named_parameters()}
    slow_names = {names[id(value)] for value in slow["params"]}
    fast_names = {names[id(value)] for value in fast["params"]}
    assert slow_names == {name for name in names.values() if name.startswith("backbone.")}
    assert any(name.startswith("backbone.reassemble.") for name in slow_names)
    assert {name.split(".")[0] for name in fast_names} == {"decoder", "head", "regularisation"}
    assert len(slow_names) + len(fast_names) == len(names)


@pytest.mark.parametrize(("batch", "lr_batch", "factor"), [(1, 16, 1 / 16), (16, 16, 1), (32, 16, 2), (4, None, 1)])
def test_the_rate_is_scaled_by_the_batch(batch, lr_batch, factor):
    groups = (
        training(**{**PAPER, "batch": batch, "lr_batch": lr_batch}).configure_optimizers()["optimizer"].param_groups
    )
    assert [group["lr"] for group in groups] == pytest.approx([0.004 * factor, 0.04 * factor])


def test_adamw():
    optimiser = training(optimiser="adamw", lr=1e-3, weight_decay=0.01).configure_optimizers()["optimizer"]
    assert type(optimiser) is torch.optim.AdamW
    assert [group["lr"] for group in optimiser.param_groups] == pytest.approx([1e-4, 1e-3])
    assert all(group["weight_decay"] == 0.01 for group in optimiser.param_groups)


def test_frozen_weights_are_in_no_group():
    module = training(**PAPER)
    module.model.backbone.vit.requires_grad_(False)  # type: ignore[union-attr]
    slow, _ = module.configure_optimizers()["optimizer"].param_groups
    assert len(slow["params"]) == sum(1 for _ in module.model.backbone.reassemble.parameters())  # type: ignore[union-attr]


def test_poly_once_per_epoch():
    factors = [training(**PAPER).lr_factor(step) for step in range(12)]
    expected = [(1 - epoch / 4) ** 0.9 for epoch in range(4) for _ in range(3)]
    assert factors == pytest.approx(expected)
    assert factors[::3] == pytest.approx([1.0, 0.771890, 0.535887, 0.287175], abs=1e-6)


def test_an_unfinished_last_epoch_does_not_reach_nought():
    module = training(**PAPER, steps=13, steps_per_epoch=3)
    assert module.lr_factor(12) == module.lr_factor(11) > 0


def test_poly_per_step():
    factors = [training(**{**PAPER, "schedule_unit": "step"}).lr_factor(step) for step in range(14)]
    assert factors == pytest.approx([(1 - min(step, 12) / 12) ** 0.9 for step in range(14)])
    assert training(**{**PAPER, "schedule_unit": "step", "poly_power": 2.0}).lr_factor(6) == pytest.approx(0.25)


def test_cosine_after_a_warm_up():
    module = training(schedule="cosine", warmup=4)
    assert [module.lr_factor(step) for step in (0, 3, 4, 8, 12)] == pytest.approx([0.25, 1, 1, 0.5, 0])


def test_the_schedule_drives_both_groups():
    module = training(**PAPER)
    made = module.configure_optimizers()
    assert made["lr_scheduler"]["interval"] == "step"
    optimiser, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(4):
        rates.append([group["lr"] for group in optimiser.param_groups])
        optimiser.step()
        schedule.step()
    assert rates[0] == rates[2] == pytest.approx([0.001, 0.01])
    assert rates[3] == pytest.approx([0.001 * 0.75**0.9, 0.01 * 0.75**0.9])


def test_a_step_is_the_papers_loss(monkeypatch):
    module = training(**PAPER).eval()
    logged = SimpleNamespace()
    monkeypatch.setattr(module, "log", lambda name, value, **_: setattr(logged, name, value))
    images, target = torch.randn(2, 3, 32, 32), torch.randint(-1, 3, (2, 32, 32))
    target[target < 0] = -100
    with torch.no_grad():
        loss = module.training_step({"image": images, "target": target}, 0)
        logits = module.model(images, module.text)
    assert loss == pytest.approx(float(nn.functional.cross_entropy(logits, target, ignore_index=-100)), abs=1e-5)
    assert torch.equal(logged.loss, loss)


def test_two_ranks_together_have_the_loss_of_one_process(monkeypatch):
    module = training(**PAPER).eval()
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    text = torch.randn(3, 6)
    module.text = text
    images, target = torch.randn(4, 3, 32, 32), torch.randint(-1, 3, (4, 32, 32))
    target[target < 0] = -100
    target[3, :20] = -100  # the halves have different numbers of labelled pixels
    counts = [float((part != -100).sum()) for part in target.chunk(2)]

    def losses() -> list[torch.Tensor]:
        with torch.no_grad():
            parts = zip(images.chunk(2), target.chunk(2), strict=True)
            return [module.training_step({"image": image, "target": labels}, 0) for image, labels in parts]

    alone = losses()
    fake = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        get_world_size=lambda: 2,
        all_reduce=lambda total: total.fill_(sum(counts)),
    )
    monkeypatch.setattr("lexiseg.methods.lseg.module.distributed", fake)
    together = losses()
    with torch.no_grad():
        logits = module.model(images, text)
    expected = float(nn.functional.cross_entropy(logits, target, ignore_index=-100))
    assert float(torch.stack(together).mean()) == pytest.approx(expected, rel=1e-5)
    assert float(torch.stack(alone).mean()) != pytest.approx(expected, rel=1e-5)


def test_the_label_vectors_are_not_part_of_the_model():
    module = training(**PAPER)
    assert "text" not in module.state_dict()
    assert not module.text.requires_grad
