"""TCL's training: phases, optimiser groups and schedule of the official recipe."""

from typing import Any

import open_clip
import pytest
import torch
import torch.distributed as distributed
import torch.multiprocessing as multiprocessing
from helpers.tiny import tiny_clip
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lexiseg.checkpoint import checkpoints_in
from lexiseg.encoders.clip import build_clip
from lexiseg.errors import ModelError, SettingsError
from lexiseg.methods.tcl.model import TCL
from lexiseg.methods.tcl.module import TCLTraining, losses
from lexiseg.methods.tcl.settings import LossSettings, ModelSettings, TrainSettings
from lexiseg.settings import parse
from lexiseg.training import fit

PAPER: dict[str, Any] = {
    "steps": 50_000,
    "decoder_steps": 30_000,
    "lr": 3e-4,
    "min_lr": 4e-5,
    "lr_batch": 4096,
    "warmup": 15_000,
    "weight_decay": 0.05,
    "clip_gradient": 5.0,
    "batch": 1024,
    "splits": ("train",),
    "shards": None,
    "text": "caption",
    "size": (224, 224),
    "crop_scale": (0.08, 1.0),
    "flip": True,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "erasing": 0.25,
    "workers": 0,
    "precision": "32-true",
}
LOSS: dict[str, Any] = {
    "image": 0.1,
    "feature": 0.1,
    "area": 0.4,
    "positive_prior": 0.4,
    "negative_prior": 0.0,
    "smooth": 1.0,
    "mask_temperature": 1.0,
}


def training(visual=None, text=None, **changes):
    model = TCL(visual or tiny_clip()[0].visual)
    return TCLTraining(
        model,
        text=text or nn.Identity(),
        train=TrainSettings(**{**PAPER, **changes}),
        loss=LossSettings(**LOSS),
    )


def vit_b_16():
    with torch.device("meta"):
        return build_clip({"kind": "open_clip", "model": open_clip.get_model_config("ViT-B-16")}, source="").visual


def test_the_parameters_of_both_phases_are_the_published_ones():
    model = TCL(vit_b_16())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    block = sum(p.numel() for p in model.grounder.block.parameters())
    assert (trained - block, trained) == (21_637_640, 28_725_512)


def test_what_decays():
    module = training(vit_b_16())
    decaying, still = (group["params"] for group in module.configure_optimizers()["optimizer"].param_groups)
    assert {p.ndim for p in still} == {1}
    assert {p.ndim for p in decaying} == {0, 2, 4}
    assert sum(p.ndim == 0 for p in decaying) == 8  # four gates, the mask's scale and bias, two temperatures
    assert len(decaying) + len(still) == sum(p.requires_grad for p in module.model.parameters())


def test_the_schedule():
    module = training()
    optimiser = module.configure_optimizers()["optimizer"]
    assert optimiser.defaults["lr"] == pytest.approx(7.5e-5)
    assert optimiser.defaults["eps"] == 1e-6
    rate = [7.5e-5 * module.lr_factor(step) for step in (0, 7_500, 15_000, 32_500, 50_000)]
    assert rate == pytest.approx([7.5e-9, (7.5e-9 + 7.5e-5) / 2, 7.5e-5, (7.5e-5 + 1e-5) / 2, 1e-5])


class Words(nn.Module):
    """Text embeddings that are looked up."""

    def __init__(self):
        super().__init__()
        self.vectors = nn.Embedding(8, 24)

    def forward(self, ids):
        return self.vectors(ids[:, 0])


def batch(step):
    rng = torch.Generator().manual_seed(step)
    return {
        "image": torch.randn(4, 3, 16, 16, generator=rng),
        "tokens": torch.randint(0, 8, (4, 5), generator=rng),
        "step": step,
    }


def trained(**changes):
    torch.manual_seed(0)
    recipe = {"steps": 6, "decoder_steps": 3, "lr": 0.01, "min_lr": 0.0, "lr_batch": None, "warmup": 1, "batch": 4}
    module = training(text=Words(), **{**recipe, **changes})
    before = {name: value.clone() for name, value in module.state_dict().items()}
    curve = fit(module, batch=batch, steps=changes.pop("run", 6), seed=0, gradient_clip=5.0)
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    return module, changed, curve


def test_the_last_block_learns_in_the_second_phase_alone():
    _, first, _ = trained(decoder_steps=6)
    assert not any(name.startswith("model.grounder.block.") for name in first)
    _, both, _ = trained()
    assert any(name.startswith("model.grounder.block.") for name in both)
    for changed in (first, both):
        assert {"model.grounder.proj", "model.grounder.sim_to_mask.bias", "model.feature_log_scale"} <= changed
        assert not any(name.startswith(("model.visual.", "text.")) for name in changed)


def test_the_curve_names_every_loss():
    _, _, curve = trained()
    names = {"image", "feature", "area_positive", "area_negative", "smooth_masks", "smooth_embedding"}
    for row in curve:
        assert row.keys() == {"step", "loss", *names}
        assert row["loss"] == pytest.approx(sum(row[name] for name in names), rel=1e-5)


def test_twice_gives_the_same():
    first, second = trained()[0].state_dict(), trained()[0].state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def work(rank, store, results):
    """One of two processes, with half of each batch, through both phases."""
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    results[rank] = {k: v.numpy() for k, v in steps_of(rank=rank, ranks=2).items()}
    distributed.destroy_process_group()


def steps_of(*, rank, ranks):
    """What was learned in two steps of the first phase and two of the second, in double precision."""
    torch.manual_seed(0)
    tower = tiny_clip()[0].visual.double()
    module = training(tower, steps=4, decoder_steps=2, lr=0.01, min_lr=0.0, lr_batch=None, warmup=1, batch=4)
    module.double()
    with torch.no_grad():
        # At 0 neighbours are copies, and rounding decides the sign of their differences, which TV's slope is.
        for name, parameter in module.model.named_parameters():
            if name.endswith(".gate"):
                parameter.fill_(0.3)
    optimiser = module.configure_optimizers()["optimizer"]
    model = DistributedDataParallel(Step(module)) if ranks > 1 else Step(module)
    for step in range(4):
        rng = torch.Generator().manual_seed(step)
        images, text = torch.randn(4, 3, 16, 16, generator=rng).double(), torch.randn(4, 24, generator=rng).double()
        noise = torch.rand(4, 1, 8, 8, generator=rng).double()
        half = slice(rank * 4 // ranks, (rank + 1) * 4 // ranks)
        optimiser.zero_grad()
        model(images[half], text, noise[half], rank).backward()
        module.first_phase = step < 2
        module.on_before_optimizer_step(optimiser)
        optimiser.step()
    return {n: p.detach() for n, p in module.model.named_parameters() if p.requires_grad}


class Step(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.model, self.loss = module.model, module.loss

    def forward(self, images, text, noise, rank):
        return sum(losses(self.model, images, text, noise=noise, rank=rank, settings=self.loss).values())


def test_two_processes_learn_what_one_does_in_both_phases(tmp_path):
    expected = steps_of(rank=0, ranks=1)
    with multiprocessing.Manager() as manager:
        results = manager.dict()
        multiprocessing.spawn(work, args=(tmp_path / "store", results), nprocs=2)
        for rank in range(2):
            for name, value in results[rank].items():
                torch.testing.assert_close(torch.from_numpy(value), expected[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("left_out", ["image", "feature", "area", "smooth"])
def test_a_loss_of_weight_zero_is_left_out(left_out):
    model, rng = TCL(tiny_clip()[0].visual), torch.Generator().manual_seed(0)
    found = losses(
        model,
        torch.randn(3, 3, 16, 16, generator=rng),
        torch.randn(3, 24, generator=rng),
        noise=torch.rand(3, 1, 8, 8, generator=rng),
        rank=0,
        settings=LossSettings(**{**LOSS, left_out: 0.0}),
    )
    assert not any(name.startswith(left_out) for name in found)
    assert len(found) == 6 - (2 if left_out in ("area", "smooth") else 1)
    assert all(torch.isfinite(value) for value in found.values())


def test_settings_that_make_no_sense():
    for changes, fault in (({"min_lr": 1.0}, "min_lr"), ({"warmup": 50_000}, "warmup")):
        with pytest.raises(SettingsError, match=fault):
            parse({**PAPER, **changes}, TrainSettings, source="the recipe")
    with pytest.raises(SettingsError, match="loss"):
        parse({**LOSS, "image": 0.0, "feature": 0.0, "area": 0.0, "smooth": 0.0}, LossSettings, source="the loss")
    model = {"stages": 2, "units": 2, "kernel": 4, "gate": 0.0, "scale": 10.0, "bias": -2.5, "temperature": 0.07}
    with pytest.raises(SettingsError, match="model"):
        parse({**model, "statistics": "clip"}, ModelSettings, source="the model")


@pytest.mark.parametrize("clip_gradient", [None, 1.0])
def test_a_training_that_diverges_stops_with_the_step_and_what_broke(tmp_path, clip_gradient, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = training(text=nn.Identity(), steps=6, decoder_steps=6, lr=1e30, min_lr=0.0, lr_batch=None, warmup=0)

    def batch(step):
        rng = torch.Generator().manual_seed(step)
        images, text = torch.randn(3, 3, 16, 16, generator=rng), torch.randn(3, 24, generator=rng)
        return {"image": images, "tokens": text, "step": step}

    with pytest.raises(
        ModelError, match=r"TCL diverged in step [2-6]: not finite: .*(image|feature|gradient)"
    ) as caught:
        fit(module, batch=batch, steps=6, seed=0, gradient_clip=clip_gradient)
    assert "tcl.train.lr" in caught.value.fix


def test_frozen_parts_stay_in_evaluation_mode():
    module = training(text=nn.Dropout(0.5)).train()
    assert module.model.grounder.training
    assert not module.text.training
    assert not module.model.visual.training


class StoppedError(Exception):
    pass


def run_to(folder, *, stop=None):
    """Weights after six steps, three in each phase; with `stop`, the batch of that step is an interruption."""
    torch.manual_seed(0)
    module = training(
        tiny_clip()[0].visual, steps=6, decoder_steps=3, lr=0.01, min_lr=0.0, lr_batch=None, warmup=1, batch=3
    )

    def batch(step):
        if step == stop:
            raise StoppedError
        rng = torch.Generator().manual_seed(step)
        images, text = torch.randn(3, 3, 16, 16, generator=rng), torch.randn(3, 24, generator=rng)
        return {"image": images, "tokens": text, "step": step, "skipped": 1}

    with checkpoints_in(folder):
        curve = fit(module, batch=batch, steps=6, seed=0)
    return {name: value.clone() for name, value in module.state_dict().items()}, curve


@pytest.mark.parametrize("stops", [(2,), (3,), (5,), (1, 4)])
def test_a_training_that_is_interrupted_in_either_phase_ends_with_the_same_bits(tmp_path, stops, monkeypatch):
    monkeypatch.setenv("LEXISEG_CHECKPOINT_SECONDS", "0")
    expected, expected_curve = run_to(tmp_path / "whole")
    for stop in stops:
        with pytest.raises(StoppedError):
            run_to(tmp_path / "parts", stop=stop)
    found, curve = run_to(tmp_path / "parts")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert curve == expected_curve
    assert int(found["skipped"]) == 6
    block = {name: value for name, value in expected.items() if "grounder.block" in name and value.ndim == 2}
    before = training(tiny_clip()[0].visual).state_dict()
    assert all(not torch.equal(value, before[name]) for name, value in block.items())  # the second phase took place
