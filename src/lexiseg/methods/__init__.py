"""The registry: a method's name -> its parts. A new method is one folder and one entry here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from lexiseg.errors import ModelError
from lexiseg.storage import read_json


class Scorer(Protocol):
    """What the shared nodes of the graph need of a method."""

    def scores(self, images: Sequence[np.ndarray], labels: Sequence[str]) -> list[np.ndarray]:
        """Low-resolution scores float32 (N, h, w), for a refiner (K, N, h, w), of each uint8 RGB picture (H, W, 3)."""
        ...


@dataclass(frozen=True)
class Method:
    """Where a method's parts are, as "module:name", so that asking for one does not import all.

    Attributes:
        folder: below outputs/, where its stages write.
        load: model folder (Path) -> Scorer; `encode=` and `predict=` are those of `load_scorer`. A method of clusters
            has what `lexiseg.inference.Model` asks of it instead: `names`, `owners` and `segment`.
        stages: the method's own graph nodes, by the name after "<method>-".
        model: the one of its nodes whose output is the model folder.
        baselines: the group of dvc.yaml that stands beside it, `<group>-predict@<name>` and `<group>-evaluate@<name>`.
        settings: its Block in params.yaml.
        ablations: table name -> variant name -> changed settings; the first table is the usual one.
        spaces: name -> knobs that `lexiseg sweep` searches (`lexiseg.sweeps.space`); the first is the usual one.
        watched: its training can be looked at on its way (`save` of `lexiseg.training.fit`), and ended by a sweep.
        importer: (ForeignCheckpoint, options) -> Imported, for checkpoints of the official implementation.
        refiner: `refine` of its block in params.yaml -> what makes final scores of the saved ones and the picture
            (`lexiseg.evaluation.evaluate.Refine`); None: the saved scores are final.
        overlapping: final scores are soft masks, 0..1, each label's by itself; False: logits of labels that compete.
        clusters: its classes are clusters, named after they were found; a model of it can be asked without labels.
    """

    folder: str
    load: str
    stages: Mapping[str, str] = field(default_factory=dict)
    model: str = "train"
    baselines: str = "baseline"
    settings: str | None = None
    ablations: str | None = None
    spaces: str | None = None
    watched: bool = False
    importer: str | None = None
    refiner: str | None = None
    overlapping: bool = False
    clusters: bool = False


@dataclass(frozen=True)
class Imported:
    """An official checkpoint in our words.

    Attributes:
        config: model.json.
        tensors: model.safetensors, complete.
        text_dim: size of the label vectors that the network expects; None: it takes none.
        clip: state dict of the CLIP that the checkpoint carries, in OpenAI's names, or None.
        dropped: how many tensors were left out on purpose, by the start of their names.
        unexpected: official names that the importer does not know.
        licence: of the weights.
        templates: sentences that the official code puts a label into.
        average: how it takes their mean, see `lexiseg.encoders.text.ClipText`.
        needs_clip: the network computes with the image tower of its CLIP, too; or, where it takes no label vectors, its
            clusters can be named with one.
        trunk: trunk.json and tensors of a frozen trunk, see `lexiseg.encoders.trunk.load_trunk`; None: it has none.
        training: what the file says of the network's training, in the words of the official code.
        graph: changes of the method's block of params.yaml under which the graph evaluates the model as it is, beside
            those that follow from `config`.
        notes: what else there is to know, in words.
    """

    config: dict[str, Any]
    tensors: Mapping[str, Any]
    text_dim: int | None
    clip: Mapping[str, Any] | None
    dropped: Mapping[str, int]
    unexpected: tuple[str, ...]
    licence: str
    templates: tuple[str, ...] = ("{}",)
    average: Literal["unit", "raw"] = "unit"
    needs_clip: bool = False
    trunk: tuple[dict[str, Any], Mapping[str, Any]] | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    graph: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


METHODS: dict[str, Method] = {
    "lseg": Method(
        folder="lseg",
        load="lexiseg.methods.lseg.segmenter:LSegSegmenter.load",
        stages={"train": "lexiseg.methods.lseg.stages:train"},
        settings="lexiseg.methods.lseg.settings:LSegSettings",
        ablations="lexiseg.methods.lseg.ablations:TABLES",
        spaces="lexiseg.methods.lseg.spaces:SPACES",
        watched=True,
        importer="lexiseg.methods.lseg.checkpoint:import_checkpoint",
    ),
    "tcl": Method(
        folder="tcl",
        load="lexiseg.methods.tcl.segmenter:TCLSegmenter.load",
        stages={"train": "lexiseg.methods.tcl.stages:train"},
        settings="lexiseg.methods.tcl.settings:TCLSettings",
        ablations="lexiseg.methods.tcl.ablations:TABLES",
        spaces="lexiseg.methods.tcl.spaces:SPACES",
        watched=True,
        importer="lexiseg.methods.tcl.checkpoint:import_checkpoint",
        refiner="lexiseg.methods.tcl.refine:refiner",
        overlapping=True,
    ),
    "stego": Method(
        folder="stego",
        load="lexiseg.methods.stego.segmenter:StegoSegmenter.load",
        stages={
            "features": "lexiseg.methods.stego.stages:features",
            "neighbours": "lexiseg.methods.stego.stages:neighbours",
            "train": "lexiseg.methods.stego.stages:train",
            "probe": "lexiseg.methods.stego.stages:probe",
            "predict": "lexiseg.methods.stego.stages:predict",
            "name": "lexiseg.methods.stego.stages:name",
        },
        model="probe",
        baselines="kmeans",
        settings="lexiseg.methods.stego.settings:StegoSettings",
        ablations="lexiseg.methods.stego.ablations:TABLES",
        spaces="lexiseg.methods.stego.spaces:SPACES",
        importer="lexiseg.methods.stego.checkpoint:import_checkpoint",
        refiner="lexiseg.methods.stego.refine:refiner",
        clusters=True,
    ),
}

# Baselines stand beside the methods; the graph makes one `baseline-predict@<name>` for each that params.yaml lists.
BASELINES: dict[str, str] = {
    "maskclip": "lexiseg.methods.baselines.maskclip:predictor",
    "linear": "lexiseg.methods.baselines.linear:predictor",
}


def resolve(reference: str) -> Callable[..., Any]:
    """The object that "module:name.attribute" means."""
    module, _, path = reference.partition(":")
    found: Any = import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def load_refiner(folder: Path) -> Callable[[np.ndarray, np.ndarray], np.ndarray] | None:
    """What the method of a model folder does to saved scores, with the settings it was registered with, or None."""
    config = read_json(folder / "model.json")
    refiner = METHODS[config["method"]].refiner
    return resolve(refiner)(config.get("refine", {})) if refiner else None


def load_scorer(folder: Path, *, encode: Path | None = None, predict: Mapping[str, Any] | None = None) -> Any:
    """Load the model in a folder, whatever method made it.

    Args:
        folder: a registered model, or the output of a train stage.
        encode: the encode folder, where the model folder does not carry its text side (train stages).
        predict: the method's block `predict` of params.yaml; None: what the model folder was registered with.

    Raises:
        ModelError: not a model folder, or one of a method that this version does not know.
    """
    path = folder / "model.json"
    if (folder / "not-run.json").is_file():
        raise ModelError(
            found=f"{folder} holds a note that its method was not run",
            allowed="a model folder",
            fix="set `run: true` in the method's block of params.yaml, then `dvc repro`",
        )
    if not path.is_file():
        raise ModelError(
            found=f"{folder} has no model.json",
            allowed="a model folder: outputs/<method>/register, or a download of a registered model",
            fix="run `dvc repro` to make one, or pass --model FOLDER or --model models:/NAME@ALIAS",
        )
    try:
        name = read_json(path)["method"]
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(
            found=f"{path} is damaged or of another program ({type(error).__name__}: {error})",
            allowed="the model.json of a model folder, which names its method",
            fix="copy the whole model folder again",
        ) from error
    if not isinstance(name, str) or name not in METHODS:
        raise ModelError(
            found=f"{path} is of the method {name!r}",
            allowed=f"one of {', '.join(METHODS)}",
            fix="use a model of one of these, or update lexiseg",
        )
    try:
        return resolve(METHODS[name].load)(folder, encode=encode, predict=predict)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise ModelError(
            found=f"{folder} is damaged ({type(error).__name__}: {' '.join(str(error).split())[:300]})",
            allowed="a model folder as lexiseg wrote it",
            fix="copy the whole model folder again, or train with this version",
        ) from error
