"""A working tree as a small graph leaves it: outputs, dvc.lock with true hashes, git; no stage has to run."""

from __future__ import annotations

import base64
import io
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from dvc.repo import Repo
from PIL import Image
from ruamel.yaml import YAML

from lexiseg.pipeline import hash_dependencies
from lexiseg.storage import write_json, write_text

SPLIT = {"miou": 0.5, "miou_seen": 0.6, "miou_unseen": 0.25, "boundary_f": None}
CODE = {"prepare": "src/lexiseg/data", "encode": "src/lexiseg/encoders", "lseg": "src/lexiseg/methods/lseg"}
CODE["evaluate"] = "src/lexiseg/evaluation"
# Stage: its deps, params, outs.
GRAPH: dict[str, tuple[list[str], dict, list[str]]] = {
    "prepare": (["data/tiny", CODE["prepare"]], {"data": {"name": "tiny", "workers": 2}}, ["outputs/prepare"]),
    "encode": (
        ["outputs/prepare", CODE["encode"]],
        {"seed": 0, "encode": {"clip": {"source": "pretrain", "model": None}, "stand_ins": {}}},
        ["outputs/encode"],
    ),
    "encode-evaluate": (["outputs/encode", CODE["encode"]], {"threads": 2}, ["outputs/encode-evaluate/metrics.json"]),
    "lseg-train": (
        ["outputs/encode", "outputs/prepare", CODE["lseg"]],
        {"seed": 0, "lseg.train": {"lr": 0.001, "crop": None, "scale": [0.5, 2.0]}},
        ["outputs/lseg/train"],
    ),
    "lseg-predict": (
        ["outputs/lseg/train", "outputs/prepare", CODE["lseg"]],
        {"evaluate.splits": ["test"]},
        ["outputs/lseg/predict"],
    ),
    "lseg-evaluate": (
        ["outputs/lseg/predict", "outputs/prepare", CODE["evaluate"]],
        {"evaluate": {"protocol": "generic", "splits": ["test"]}},
        ["outputs/lseg/evaluate/metrics.json", "outputs/lseg/evaluate/pictures", "outputs/lseg/evaluate/tables"],
    ),
    "lseg-register": (
        ["outputs/lseg/evaluate/metrics.json", "outputs/lseg/train"],
        {"lseg.predict": {"resize": None}},
        ["outputs/lseg/register"],
    ),
    "baseline-predict@linear": (
        ["outputs/encode", "outputs/prepare", CODE["lseg"]],
        {"baseline": {"linear": {"steps": 5}}},
        ["outputs/baselines/linear/predict"],
    ),
    "baseline-evaluate@linear": (
        ["outputs/baselines/linear/predict", "outputs/prepare", CODE["evaluate"]],
        {"evaluate": {"protocol": "generic", "splits": ["test"]}},
        [
            "outputs/baselines/linear/evaluate/metrics.json",
            "outputs/baselines/linear/evaluate/pictures",
            "outputs/baselines/linear/evaluate/tables",
        ],
    ),
    "report": (
        ["outputs/baselines", "outputs/lseg/evaluate/metrics.json"],
        {"profile": "tiny"},
        ["outputs/report/results.json"],
    ),
}


@dataclass(frozen=True)
class Tree:
    """A working tree whose stages can be said to have run."""

    root: Path

    def ran(self, *stages: str) -> None:
        """Write dvc.lock as after these stages (default: all) ran on what is on disk now."""
        path = self.root / "dvc.lock"
        yaml = YAML(typ="safe", pure=True)
        lock = yaml.load(path.read_text()) if path.exists() else {"schema": "2.0", "stages": {}}
        names = stages or tuple(GRAPH)
        paths = sorted({path for name in names for path in (*GRAPH[name][0], *GRAPH[name][2])})
        hashed = hash_dependencies(self.root, [str(self.root / path) for path in paths])
        found = {path: hashed[str(self.root / path)] for path in paths}

        def entries(paths: list[str]) -> list[dict[str, str]]:
            return [{"path": path, "hash": "md5", "md5": found[path]} for path in paths]

        for name in names:
            deps, params, outs = GRAPH[name]
            previous = lock["stages"].get(name, {}).get("params", {}).get("params.yaml", params)
            lock["stages"][name] = {
                "cmd": f"lexiseg stage {name}",
                "deps": entries(deps),
                "params": {"params.yaml": previous},
                "outs": entries(outs),
            }
        stream = io.StringIO()
        yaml.dump(lock, stream)
        path.write_text(stream.getvalue())

    def git(self, *arguments: str) -> None:
        """Run git in the tree."""
        who = ("-c", "user.name=test", "-c", "user.email=test@example.org")
        subprocess.run(["git", *who, *arguments], cwd=self.root, check=True, capture_output=True)

    def metrics(self, method: str = "lseg", *, protocol: str = "a" * 64, **values: float) -> None:
        """Write the metrics of an evaluation."""
        write_json(
            self.root / "outputs" / method / "evaluate" / "metrics.json",
            {
                "method": method,
                "protocol": {"name": "generic", "hash": protocol, "card": {}},
                "splits": {"test": {**SPLIT, **values}},
            },
        )

    def model(self, *, steps: int = 3) -> None:
        """Write what training and registering leave."""
        rows = "".join(f"{step},{1 / (step + 1):.6g}\n" for step in range(steps))
        write_text(self.root / "outputs/lseg/train/curve.csv", f"step,loss\n{rows}")
        for folder in ("train", "register"):
            write_text(self.root / f"outputs/lseg/{folder}/model.safetensors", f"weights of {steps} steps")
        vocabulary = {"names": ["grass", "sky", "ring"], "seen": [True, True, False]}
        write_json(self.root / "outputs/lseg/register/vocabulary.json", vocabulary)
        write_json(self.root / "outputs/lseg/register/model.json", {"method": "lseg"})
        write_json(
            self.root / "outputs/lseg/register/card.json",
            {
                "method": "lseg",
                "package": "lexiseg 0.1.0",
                "data": {
                    "name": "tiny",
                    "content_digest": "c" * 64,
                    "validation": {"success": True, "expectations": 9, "failed": ["captions_not_empty"]},
                },
                "licences": {"data": "CC0-1.0", "text": None, "code": "Apache-2.0"},
                "protocol": {"name": "generic", "hash": "a" * 64, "card": {}},
                "metrics": {"test": SPLIT},
            },
        )


@pytest.fixture(scope="session")
def finished_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree in which everything ran, and an MLflow database without runs; copied, never used itself."""
    root = tmp_path_factory.mktemp("finished")
    tree = Tree(root)
    for folder in CODE.values():
        write_text(root / folder / "code.py", f"# {folder}\n")
    write_text(root / "dvc.yaml", "stages: {}\n")
    write_text(root / "params.yaml", "profile: other\n")
    write_text(root / ".gitignore", "/outputs\n/data\n/.lexiseg\n__pycache__\n")
    tree.git("init", "-q")
    Repo.init(str(root))
    tree.git("add", "-A")
    tree.git("commit", "-qm", "first")
    write_text(root / "data/tiny/world.txt", "a world")
    for name in ("prepare/info.json", "encode/text.json", "lseg/predict/index.json", "report/results.json"):
        write_json(root / "outputs" / name, {"name": name})
    write_json(root / "outputs/baselines/linear/predict/index.json", {})
    write_json(
        root / "outputs/encode-evaluate/metrics.json",
        {"stand_ins": {}, "retrieval": {"test": {"pairs": 8, "image_to_text_r1": 0.75}, "stress": None}},
    )
    tree.model()
    for method in ("lseg", "baselines/linear"):
        tree.metrics(method)
        folder = root / "outputs" / method / "evaluate"
        write_text(folder / "tables/test_per_class.csv", "class,iou\ngrass,0.5\n")
        (folder / "pictures").mkdir()
        Image.new("RGB", (8, 8)).save(folder / "pictures/test_0.png")
    tree.ran()
    from lexiseg.tracking.store import connect

    connect(root)
    return root


@pytest.fixture
def tree(finished_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """An own copy of the finished tree (its path holds a space)."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "LEXISEG_HOME"):
        monkeypatch.delenv(name, raising=False)
    root = tmp_path / "my tree"
    shutil.copytree(finished_tree, root)
    return Tree(root)


@pytest.fixture
def picture() -> Callable[..., str]:
    """A picture file as base64."""

    def make(height: int = 12, width: int = 20) -> str:
        stream = io.BytesIO()
        Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(stream, format="PNG")
        return base64.b64encode(stream.getvalue()).decode()

    return make
