import errno
import os
import pickle
import signal
import subprocess
import sys

import lightning as L
import pytest
import torch
from torch import nn

from lexiseg import checkpoint as module
from lexiseg import training
from lexiseg.checkpoint import Checkpoint, checkpoint_file, checkpoints_in, load_checkpoint, save_checkpoint
from lexiseg.errors import DataError, SettingsError
from lexiseg.training import fit

STATE = Checkpoint(
    step=3,
    batches=8,
    module={"weight": torch.ones(2)},
    optimisers=[{"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}],
    schedulers=[{"last_epoch": 3}],
    curve=[{"step": 3, "loss": 0.5}],
    torch=str(torch.__version__),
)


class Network(L.LightningModule):
    """All that makes a step depend on the past: momentum, batch statistics, a schedule; and dropout."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))

    def training_step(self, batch, batch_index):
        loss = self.layers(batch).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimiser = torch.optim.AdamW(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 / (1 + step))
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class StoppedError(Exception):
    pass


def batch(step):
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(step))


def trained(folder, *, make=batch, title="train", **options):
    """Weights and curve after a training with its checkpoints in `folder`."""
    network = Network()
    with checkpoints_in(folder):
        curve = fit(network, batch=make, seed=1, title=title, **{"steps": 12, **options})
    return network.state_dict(), curve


def kept(path):
    checkpoint = load_checkpoint(path)
    assert checkpoint is not None
    return checkpoint


def stopped_at(folder, step, **options):
    """Begin a training whose batch of that step cannot be made."""

    def make(index):
        if index == step:
            raise DataError(found="a", allowed="b", fix="c")
        return batch(index)

    with pytest.raises(DataError):
        trained(folder, make=make, **options)


def same(one, other):
    return one[1] == other[1] and all(torch.equal(one[0][name], other[0][name]) for name in one[0])


@pytest.fixture(autouse=True)
def _every_step(monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)


# ---- going on ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", [1, 5, 11])
def test_an_interrupted_training_ends_like_an_uninterrupted_one(tmp_path, workers, step):
    whole = trained(tmp_path / "whole")
    stopped_at(tmp_path / "parts", step, workers=workers)
    assert kept(tmp_path / "parts/train.ckpt").step == step
    made = []
    rest = trained(tmp_path / "parts", make=lambda index: made.append(index) or batch(index))
    assert made == list(range(step, 12))
    assert same(rest, whole)


def test_it_may_be_interrupted_again_and_again(tmp_path):
    for step in (2, 3, 7, 11):
        stopped_at(tmp_path / "parts", step)
    assert same(trained(tmp_path / "parts"), trained(tmp_path / "whole"))


def test_between_accumulated_batches_there_is_no_checkpoint(tmp_path):
    whole = trained(tmp_path / "whole", steps=4, accumulate=3)
    stopped_at(tmp_path / "parts", 7, steps=4, accumulate=3)
    assert kept(tmp_path / "parts/train.ckpt").step in (3, 6)
    assert same(trained(tmp_path / "parts", steps=4, accumulate=3), whole)


def test_a_finished_training_is_not_repeated(tmp_path):
    whole = trained(tmp_path)
    assert same(trained(tmp_path, make=lambda index: 1 / 0), whole)


def test_each_training_of_a_stage_has_its_own(tmp_path):
    trained(tmp_path, title="first phase", steps=3)
    stopped_at(tmp_path, 2, title="second phase", steps=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first-phase.ckpt", "second-phase.ckpt"]


def test_an_error_inside_a_step_keeps_the_checkpoint_before_it(tmp_path, monkeypatch):
    """The batch statistics have changed and the weights have not: that is no state to go on from."""
    whole = trained(tmp_path / "whole")

    class Faulty(Network):
        def training_step(self, batch, batch_index):
            loss = super().training_step(batch, batch_index)
            if batch_index == 5:
                raise StoppedError
            return loss

    with checkpoints_in(tmp_path / "parts"), pytest.raises(StoppedError):
        fit(Faulty(), batch=batch, steps=12, seed=1)
    assert 1 <= kept(tmp_path / "parts/train.ckpt").step <= 5
    assert same(trained(tmp_path / "parts"), whole)


def test_checkpoints_are_written_now_and_then(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 3600.0)
    saved = []
    monkeypatch.setattr(training, "save_checkpoint", lambda path, state: saved.append(state.step))
    trained(tmp_path)
    assert saved == [12]  # the last one: what comes after the training may be interrupted too
    saved.clear()
    stopped_at(tmp_path, 7)
    assert saved == [7]


@pytest.mark.parametrize("value", ["soon", "-1", "nan", ""])
def test_a_pause_that_is_no_time_is_refused(tmp_path, monkeypatch, value):
    monkeypatch.setenv("LEXISEG_CHECKPOINT_SECONDS", value)
    with pytest.raises(SettingsError, match=f"LEXISEG_CHECKPOINT_SECONDS={value}"):
        trained(tmp_path)


def test_outside_of_a_stage_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert checkpoint_file("train") is None
    fit(Network(), batch=batch, steps=2, seed=1)
    assert list(tmp_path.iterdir()) == []


SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_checkpoint import batch, trained
def make(step):
    if step == 4:
        print("waiting", flush=True)
        time.sleep(600)
    return batch(step)
trained(Path(sys.argv[1]), make=make, workers=1)
"""


def test_sigterm_ends_it_with_a_checkpoint(tmp_path):
    script = SCRIPT.replace("workers=1", "workers=0").replace("time.sleep(600)", "time.sleep(3)")
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "parts"), os.path.dirname(__file__)],
        stdout=subprocess.PIPE,
        env={**os.environ, "LEXISEG_CHECKPOINT_SECONDS": "3600"},
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    assert kept(tmp_path / "parts/train.ckpt").step == 5  # the batch that it waited for was trained on
    assert same(trained(tmp_path / "parts"), trained(tmp_path / "whole"))


# ---- files -------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(tmp_path):
    save_checkpoint(tmp_path / "a.ckpt", STATE)
    found = kept(tmp_path / "a.ckpt")
    assert torch.equal(found.module["weight"], torch.ones(2))
    assert found.optimisers[0]["param_groups"] == STATE.optimisers[0]["param_groups"]
    assert (found.step, found.schedulers, found.curve) == (3, STATE.schedulers, STATE.curve)


class Payload:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (self.file, "w")


@pytest.mark.parametrize("fault", ["cut", "empty", "code", "other", "version"])
def test_a_file_that_cannot_be_used_is_said_and_left(tmp_path, capsys, fault):
    path = tmp_path / "a.ckpt"
    save_checkpoint(path, STATE if fault != "version" else Checkpoint(**{**vars(STATE), "torch": "0.1"}))
    if fault == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    elif fault == "empty":
        path.write_bytes(b"")
    elif fault == "code":
        path.write_bytes(pickle.dumps(Payload(str(tmp_path / "ran"))))
    elif fault == "other":
        torch.save({"weights": 1}, path)
    assert load_checkpoint(path) is None
    assert "training starts anew" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    folder = tmp_path / "parts"
    stopped_at(folder, 4)

    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        trained(folder)
    monkeypatch.undo()
    assert kept(folder / "train.ckpt").step == 4
    assert [path.name for path in folder.iterdir()] == ["train.ckpt"]


def test_what_a_killed_writer_left_is_removed(tmp_path):
    (tmp_path / ".train.ckpt.abc.part").mkdir()
    with checkpoints_in(tmp_path):
        assert list(tmp_path.iterdir()) == []
