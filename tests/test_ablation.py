from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lexiseg import ablation as module
from lexiseg.ablation import ablate, retrieval_lines, table_lines
from lexiseg.errors import SettingsError
from lexiseg.methods.lseg.ablations import BLOCKS, CONTROLS, TABLES
from lexiseg.pipeline import Node
from lexiseg.storage import write_json


class FakeTrials:
    """Results without running anything; a seed adds a tenth, a change of settings takes a fifth."""

    def __init__(self, root: Path) -> None:
        self.root = root
        model = {"clip_residual": True, "init": "backbone", "freeze_norm": False, "block": "none", "block_depth": 1}
        self.values = {
            "lseg": {"model": model, "train": {"backbone_lr_factor": 0.1}},
            "profile": "tiny",
            "data": {"name": "world"},
            "evaluate": {"splits": ["test", "stress"]},
        }
        self.graph = {
            name: Node(name=name, cmd="", deps=deps, params=(), outs=(f"outputs/{name}",))
            for name, deps in {
                "encode": (),
                "encode-evaluate": ("outputs/encode",),
                "lseg-evaluate": ("outputs/encode",),
                "baseline-evaluate@linear": ("outputs/encode",),
                "stego-evaluate": (),
                "kmeans-evaluate@raw": (),
            }.items()
        }
        self.changes: list[dict[str, Any]] = []
        self.refused: dict[str, str] = {}  # a setting that is refused -> what is allowed

    def settings_under(self, changes: dict[str, Any]) -> None:
        for key, allowed in self.refused.items():
            if key in changes:
                raise SettingsError(found=f"1 fault(s) in `{key}`", allowed=allowed, fix="edit it")

    def run(self, changes: dict[str, Any], targets: list[str]) -> dict[str, Path]:
        self.changes.append({**changes, "targets": targets})
        folders = {}
        for target in targets:
            folders[target] = self.root / f"{len(self.changes)}-{target}"
            miou = 0.5 + 0.1 * changes["seed"] - 0.2 * (len(changes) > 2)
            unseen = None if changes["seed"] == 1 else 0.25
            test = {"miou": miou, "miou_unseen": unseen, "pixels": 7}
            group, _, item = target.partition("@")
            metrics = {
                "method": {"baseline": f"baselines/{item}", "kmeans": f"baselines/kmeans-{item}"}.get(
                    group.removesuffix("-evaluate"), group.removesuffix("-evaluate")
                ),
                "protocol": {"name": "world", "hash": "abc"},
                "splits": {"test": test, "stress": {"miou": 0.125}},
            }
            if target == "encode-evaluate":
                metrics = {
                    "retrieval": {
                        "test": {"pairs": 3, "image_to_text_r1": 0.5, "text_to_image_r1": 0.25},
                        "stress": None,
                    }
                }
            write_json(folders[target] / "metrics.json", metrics)
        return folders


@pytest.fixture
def trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeTrials:
    trials = FakeTrials(tmp_path)
    monkeypatch.setattr(module, "Trials", lambda root: trials)
    return trials


def first_row(result: dict[str, Any]) -> dict[str, Any]:
    return next(row for row in result["rows"] if (row["variant"], row["split"]) == ("as set", "test"))


def test_every_variant_and_baseline_has_a_row_for_every_split(trials, tmp_path):
    result = ablate(tmp_path, "lseg", seeds=[0, 2])
    everything = [*(("lseg", variant) for variant in CONTROLS), ("linear", None)]
    assert [(row["split"], row["method"], row["variant"]) for row in result["rows"]] == [
        *(("test", *who) for who in everything),
        ("test", "encoders", None),
        *(("stress", *who) for who in everything),
    ]
    assert result["protocol"] == {"name": "world", "hash": "abc"}
    assert (result["method"], result["profile"], result["seeds"]) == ("lseg", "tiny", [0, 2])


def test_stego_has_kmeans_beside_it_and_no_clip(trials, tmp_path):
    result = ablate(tmp_path, "stego", seeds=[0], variants=["STEGO (as set)"])
    assert {(row["method"], row["variant"]) for row in result["rows"]} == {
        ("stego", "STEGO (as set)"),
        ("kmeans-raw", None),
    }
    assert not [one for one in trials.changes if "encode-evaluate" in one["targets"]]


def test_of_variants_that_change_nothing_the_first_stays(trials, tmp_path, monkeypatch):
    trials.values["stego"] = {"probe": {"seed": 0}}
    table = {f"probe {seed}": {"stego.probe.seed": seed} for seed in (0, 1)} | {"once more": {"stego.probe.seed": 0}}
    monkeypatch.setattr(module, "resolve", lambda reference: {"probes": table})
    result = ablate(tmp_path, "stego", seeds=[0])
    assert [row["variant"] for row in result["rows"] if row["split"] == "test"] == ["probe 0", "probe 1", None]


def test_a_row_holds_every_seed_their_mean_and_deviation(trials, tmp_path):
    found = first_row(ablate(tmp_path, "lseg", seeds=[0, 2]))
    assert found["seeds"] == {"0": {"miou": 0.5, "miou_unseen": 0.25}, "2": {"miou": 0.7, "miou_unseen": 0.25}}
    assert found["mean"] == {"miou": 0.6, "miou_unseen": 0.25}
    assert found["std"]["miou"] == pytest.approx(0.141421)


def test_what_a_seed_could_not_measure_has_no_mean(trials, tmp_path):
    assert first_row(ablate(tmp_path, "lseg", seeds=[0, 1]))["mean"] == {"miou": 0.55}


def test_one_seed_has_no_deviation(trials, tmp_path):
    assert first_row(ablate(tmp_path, "lseg", seeds=[0]))["std"] == {"miou": None, "miou_unseen": None}


def test_the_seed_is_the_one_of_all_trainings(trials, tmp_path):
    ablate(tmp_path, "lseg", seeds=[4], variants=["from scratch"], splits=["val"])
    common = {"seed": 4, "evaluate.splits": ["val"]}
    assert trials.changes == [
        {**common, **CONTROLS["from scratch"], "targets": ["lseg-evaluate"]},
        {**common, "targets": ["baseline-evaluate@linear", "encode-evaluate"]},
    ]


def test_a_variant_that_changes_nothing_is_left_out(trials, tmp_path):
    trials.values["lseg"]["model"]["clip_residual"] = False
    found = ablate(tmp_path, "lseg", seeds=[0])
    assert [row["variant"] for row in found["rows"] if row["split"] == "test" and row["method"] == "lseg"] == [
        "as set",
        "from scratch",
    ]


def test_the_table(trials, tmp_path):
    lines = table_lines(ablate(tmp_path, "lseg", seeds=[0, 2], variants=["as set"]))
    assert lines == [
        "| world, split | what | mIoU | mIoU unseen |",
        "|---|---|---|---|",
        "| test | lseg, as set | 60.0 ± 14.1 | 25.0 ± 0.0 |",
        "| test | linear | 60.0 ± 14.1 | 25.0 ± 0.0 |",
        "| stress | lseg, as set | 12.5 ± 0.0 | – |",
        "| stress | linear | 12.5 ± 0.0 | – |",
    ]
    assert "±" not in table_lines(ablate(tmp_path, "lseg", seeds=[0]))[2]


def test_the_encoders_stand_below_the_table(trials, tmp_path):
    lines = retrieval_lines(ablate(tmp_path, "lseg", seeds=[0]))
    assert lines == ["Frozen CLIP, test: R@1 image to text 50.0, text to image 25.0."]


@pytest.mark.parametrize("method", ["unet", "linear"])
def test_a_method_without_ablations(trials, tmp_path, method):
    with pytest.raises(SettingsError) as caught:
        ablate(tmp_path, method, seeds=[0])
    assert caught.value.found == f"no ablations for `{method}`"
    assert caught.value.allowed == "lseg, tcl, stego"
    assert caught.value.fix


def test_another_table(trials, tmp_path):
    result = ablate(tmp_path, "lseg", seeds=[0], table="blocks")
    assert result["table"] == "blocks"
    found = [row["variant"] for row in result["rows"] if row["split"] == "test" and row["method"] == "lseg"]
    assert found == list(BLOCKS)
    with pytest.raises(SettingsError) as caught:
        ablate(tmp_path, "lseg", seeds=[0], table="block")
    assert caught.value.found == "no table `block` of lseg"
    assert caught.value.allowed == ", ".join(TABLES)


def test_an_unknown_variant(trials, tmp_path):
    with pytest.raises(SettingsError) as caught:
        ablate(tmp_path, "lseg", seeds=[0], variants=["as set", "as sett"])
    assert caught.value.found == "no variant as sett in the table controls"
    assert caught.value.allowed == ", ".join(CONTROLS)
    assert trials.changes == []


def test_a_variant_that_is_refused_is_so_before_the_first_runs(trials, tmp_path, monkeypatch):
    table = {
        "as set": {},
        "coarse, start 0": {"stego.protocol": "world_clusters11", "stego.probe.seed": 0},
        "no steps": {"stego.probe.steps": 0},
        "coarse, start 1": {"stego.protocol": "world_clusters11", "stego.probe.seed": 1},
    }
    trials.values["stego"] = {"protocol": "clusters", "probe": {"seed": 0, "steps": 9}}
    trials.refused = {"stego.protocol": "\n  - a card for 'mine'", "stego.probe.steps": "\n  - at least 1"}
    monkeypatch.setattr(module, "resolve", lambda reference: {"probes": table})
    with pytest.raises(SettingsError) as caught:
        ablate(tmp_path, "stego", seeds=[0])
    assert caught.value.found == (
        "3 of 4 variants of the table probes that settings refuse:\n"
        "  - `coarse, start 0`, `coarse, start 1`\n"
        "  - `no steps`"
    )
    assert caught.value.allowed == "\n  - a card for 'mine'\n  - at least 1"
    assert caught.value.fix.startswith("name each that is to run by --variant: `as set`; or use a profile")
    with pytest.raises(SettingsError, match="name other variants or --table"):
        ablate(tmp_path, "stego", seeds=[0], variants=["no steps"])
    assert trials.changes == []
    assert ablate(tmp_path, "stego", seeds=[0], variants=["as set"])["rows"]


def test_what_all_variants_share_is_refused_first(trials, tmp_path):
    trials.values["stego"] = {"run": False}
    trials.refused = {"stego.run": "a card for this data set"}
    with pytest.raises(SettingsError, match=r"1 fault\(s\) in `stego\.run`"):
        ablate(tmp_path, "stego", seeds=[0], variants=["STEGO (as set)"])
    assert trials.changes == []
