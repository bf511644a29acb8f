import csv
import io

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn

from lexiseg.checkpoint import checkpoints_in
from lexiseg.errors import DataError
from lexiseg.training import (
    GivenUpError,
    Onlooker,
    check_labelled_batch,
    curve_csv,
    fit,
    shuffled_indices,
    step_seed,
    warmup_cosine,
    watched_by,
)


class Noisy(L.LightningModule):
    """A layer behind dropout: its result depends on the batches, their order, and torch's own randomness."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2))
        self.losses, self.rates = [], []

    def training_step(self, batch, batch_index):
        loss = self.layers(batch["x"]).square().mean()
        self.log("loss", loss)
        self.losses.append(float(loss.detach()))
        return loss

    def on_before_optimizer_step(self, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self):
        optimiser = torch.optim.SGD(self.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 / (1 + step))
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def batch(step):
    return {"x": torch.from_numpy(np.random.default_rng([7, step]).normal(size=(3, 4)).astype(np.float32))}


def trained(**arguments):
    module = Noisy()
    rows = fit(module, batch=batch, **{"steps": 5, "seed": 3, **arguments})
    return module, rows


def weights(module):
    return [value.clone() for value in module.state_dict().values()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_step_seed_depends_on_its_three_numbers():
    seeds = {step_seed(seed, step, stream=stream) for seed in range(3) for step in range(50) for stream in range(3)}
    assert len(seeds) == 450
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert step_seed(1, 2) == step_seed(1, 2, stream=0)


def test_every_epoch_visits_everything_once_in_an_order_of_its_own():
    indices = np.concatenate([shuffled_indices(10, 4, step, seed=0) for step in range(5)])
    first, second = indices[:10], indices[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert list(first) != list(second)
    assert list(shuffled_indices(10, 4, 2, seed=0)) == list(indices[8:12])
    assert list(shuffled_indices(10, 4, 2, seed=1)) != list(indices[8:12])


def test_no_data_to_train_on():
    with pytest.raises(DataError, match="no sample to train on"):
        shuffled_indices(0, 4, 0, seed=0)


def test_a_batch_larger_than_the_data_is_full():
    assert sorted(shuffled_indices(3, 6, 0, seed=0)) == [0, 0, 1, 1, 2, 2]


def test_warm_up_then_cosine():
    factors = [warmup_cosine(step, steps=20, warmup=4, floor=0.1) for step in range(25)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert factors[12] == pytest.approx(0.55)
    assert factors[20:] == [pytest.approx(0.1)] * 5
    assert warmup_cosine(0, steps=10, warmup=0) == 1.0


def test_twice_gives_equal_weights_and_curves():
    (one, rows), (other, again) = trained(), trained()
    assert same(weights(one), weights(other))
    assert rows == again
    assert not same(weights(one), weights(trained(seed=4)[0]))


def test_what_ran_before_has_no_effect():
    one = trained()[0]
    torch.manual_seed(99)
    torch.rand(1000)
    assert same(weights(one), weights(trained()[0]))


def test_loader_workers_have_no_effect():
    assert same(weights(trained(workers=0)[0]), weights(trained(workers=2)[0]))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_batch_keeps_its_three_parts(workers):
    def batch(step):
        if step == 1:
            raise DataError(found="a", allowed="b", fix="c")
        return {"x": torch.ones(3, 4)}

    with pytest.raises(DataError) as caught:
        fit(Noisy(), batch=batch, steps=3, seed=0, workers=workers)
    assert (caught.value.found, caught.value.allowed, caught.value.fix) == ("a", "b", "c")


def test_the_curve_holds_the_loss_of_its_step():
    module, rows = trained()
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["loss"] for row in rows] == pytest.approx(module.losses)
    assert not module.training


def test_a_long_curve_has_about_fifty_rows_and_the_last_step():
    rows = trained(steps=120)[1]
    assert 50 <= len(rows) <= 61
    assert rows[-1]["step"] == 120


def test_accumulated_batches_make_one_step():
    module = trained(steps=3, accumulate=2)[0]
    assert len(module.losses) == 6
    # The schedule moves with the optimiser, not with the batches.
    assert module.rates == pytest.approx([1, 1 / 2, 1 / 3])


def test_gradients_are_clipped():
    free, clipped = trained(steps=1), trained(steps=1, gradient_clip=1e-3)
    start = weights(Noisy())
    moved = [
        sum(float((a - b).square().sum()) for a, b in zip(weights(m), start, strict=True)) ** 0.5
        for m, _ in (free, clipped)
    ]
    assert moved[1] == pytest.approx(1e-3, rel=1e-2)
    assert moved[0] > moved[1]


def test_who_only_looks_changes_nothing(tmp_path):
    module, seen = Noisy(), []

    def save(folder):
        assert not module.training
        torch.rand(100)
        torch.save(weights(module)[0], folder)

    def look(share, save):
        save(tmp_path / f"{share}")
        seen.append(share)

    with watched_by(Onlooker((0.2, 0.6, 1.0), look)):
        fit(module, batch=batch, steps=5, seed=3, save=save)
        trained()  # of what does not say how it is saved, nobody sees anything
    assert seen == [0.2, 0.6]
    assert same(weights(module), weights(trained()[0]))
    assert torch.equal(torch.load(tmp_path / "0.2"), weights(trained(steps=1)[0])[0])
    assert not torch.equal(torch.load(tmp_path / "0.6"), torch.load(tmp_path / "0.2"))


def test_parts_that_were_not_learning_are_not_afterwards():
    module = Noisy()
    module.frozen = nn.Dropout(0.5)
    modes = []

    class Frozen(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_index):
            pl_module.frozen.eval()
            modes.append((pl_module.layers.training, pl_module.frozen.training))

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_index):
            modes.append((pl_module.layers.training, pl_module.frozen.training))

    with watched_by(Onlooker((0.2, 0.4), lambda share, save: None)):
        fit(module, batch=batch, steps=5, seed=3, callbacks=[Frozen()], save=lambda folder: None)
    assert set(modes) == {(True, False)}


def test_a_training_that_is_given_up_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("LEXISEG_CHECKPOINT_SECONDS", "0")
    done = []

    def look(share, save):
        done.append(len(module.losses))
        assert list(tmp_path.glob("*.ckpt"))  # of the step before
        raise GivenUpError

    module = Noisy()
    with pytest.raises(GivenUpError), watched_by(Onlooker((0.4,), look)), checkpoints_in(tmp_path):
        fit(module, batch=batch, steps=5, seed=3, save=lambda folder: None)
    assert done == [2]
    assert not list(tmp_path.glob("*.ckpt"))


def test_what_is_stopped_while_it_is_looked_at_is_looked_at_again(tmp_path, monkeypatch):
    monkeypatch.setenv("LEXISEG_CHECKPOINT_SECONDS", "0")
    seen = []

    def look(share, save):
        seen.append(share)
        if share == 0.6 and seen.count(0.6) == 1:
            raise SystemExit(143)

    for _ in range(2):
        try:
            with watched_by(Onlooker((0.2, 0.6), look)), checkpoints_in(tmp_path):
                fit(Noisy(), batch=batch, steps=5, seed=3, save=lambda folder: None)
        except SystemExit:
            continue
    # Its checkpoint is that of the step before.
    assert seen == [0.2, 0.6, 0.6]


def test_a_curve_as_text():
    rows = [{"step": 1, "loss": 0.123456789}, {"step": 2, "loss": 1e-9}]
    assert curve_csv(rows) == "step,loss\n1,0.123457\n2,1e-09\n"
    assert [row["step"] for row in csv.DictReader(io.StringIO(curve_csv(rows)))] == ["1", "2"]


def sample(name="a", *, height=2, width=2, labelled=True):
    return {
        "id": name,
        "image": np.zeros((height, width, 3), np.uint8),
        "semantic": np.zeros((height, width), np.int64) if labelled else None,
    }


def test_a_batch_of_one_size_with_labels_passes():
    check_labelled_batch([sample("a"), sample("b")], crop="lseg.train.crop")


@pytest.mark.parametrize(
    ("samples", "found", "allowed", "fix"),
    [
        ([sample("a"), sample("b", labelled=False)], "without a label map: b", "every picture is labelled", "remove"),
        ([sample("a"), sample("b", width=3)], "2 x 2, 2 x 3", "one size", "`x.crop`"),
    ],
)
def test_a_batch_that_cannot_be_one_is_refused(samples, found, allowed, fix):
    with pytest.raises(DataError) as caught:
        check_labelled_batch(samples, crop="x.crop")
    assert found in caught.value.found
    assert allowed in caught.value.allowed
    assert fix in caught.value.fix
