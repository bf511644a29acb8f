"""Official STEGO checkpoints (mhamilton723/STEGO) -> trunk, head and probes: the table of keys, and the sizes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from lexiseg.data.label_maps import CITYSCAPES27, COCOSTUFF27, POTSDAM3
from lexiseg.encoders.trunk import build_trunk
from lexiseg.errors import ModelError
from lexiseg.evaluation.cluster_scores import cluster_names
from lexiseg.foreign import ForeignCheckpoint
from lexiseg.methods import Imported
from lexiseg.methods.stego.model import build
from lexiseg.methods.stego.settings import PredictSettings, RefineSettings
from lexiseg.settings import Block, parse
from lexiseg.vocabulary import Vocabulary

LICENCE = "repository mhamilton723/STEGO: MIT (its code); nothing is stated for the weights alone"
TRUNK_LICENCE = "Apache-2.0; DINO, facebookresearch/dino"

_TRUNK = "trunk."
# Official names -> ours. The first pattern that matches a whole name decides; None: left out on purpose.
_KEYS: tuple[tuple[str, str | None], ...] = (
    (r"net\.model\.(.*)", r"trunk.vit.\1"),
    (r"net\.cluster1\.0\.(.*)", r"head.linear.\1"),
    (r"net\.cluster2\.(\d+)\.(.*)", r"head.nonlinear.\1.\2"),
    (r"cluster_probe\.clusters", r"probe.centres"),
    (r"linear_probe\.(.*)", r"linear.\1"),
    (r"train_cluster_probe\..*", None),  # neither trained nor used with the settings of the released models
    (r"decoder\..*", None),  # of a loss whose weight is 0
)
_TRUNK_NAMES = {
    (384, 12, 8): "vit_small_patch8_224",
    (384, 12, 16): "vit_small_patch16_224",
    (768, 12, 8): "vit_base_patch8_224",
    (768, 12, 16): "vit_base_patch16_224",
}
_FACETS: dict[str, Literal["features", "keys"]] = {"feat": "features", "KK": "keys"}
# Class names by the start of what the authors call a data set, where the number of classes fits.
_CLASSES = {"cocostuff": COCOSTUFF27, "cityscapes": CITYSCAPES27, "potsdam": POTSDAM3}
# Settings of the authors -> ours below `stego`: numbers that both mean in the same way.
_WEIGHTS = {
    "pos_intra_weight": "self",
    "pos_inter_weight": "knn",
    "neg_inter_weight": "random",
    "pos_intra_shift": "self_shift",
    "pos_inter_shift": "knn_shift",
    "neg_inter_shift": "random_shift",
}
_RECIPE = {
    "pointwise": "loss.centring",
    "zero_clamp": "loss.clamp",
    "stabalize": "loss.stabilise",
    "feature_samples": "loss.points",
    "neg_samples": "loss.negatives",
    "dropout": "loss.drop_features",
    "batch_size": "train.batch",
    "lr": "train.lr",
    "num_neighbors": "neighbours.count",
    "res": "features.crop",
}
# What else of a training is worth a line on the model's card. The other settings are paths and habits of logging.
_NETWORK = ("dataset_name", "arch", "model_type", "dino_patch_size", "dino_feat_type", "projection_type", "dim")
_NOTED = (*_NETWORK, "extra_clusters", *_WEIGHTS, *_RECIPE, "max_steps", "crop_type", "use_true_labels", "use_salience")

# The authors' evaluation. Pictures for which there is nothing to compare are not cropped: see `_predict`.
_EVALUATION = {"flip": True, "crop": 320, "filter": "nearest", "max_side": None}


class ImportOptions(Block):
    """What a state dict alone does not tell; the settings in a released file tell all but the attention heads.

    Attributes:
        heads: attention heads of the ViT; None: one per 64 channels, as in all of DINO's.
        facet: what of the ViT is read: "features" (`dino_feat_type` "feat"), or "keys" ("KK").
        head: "none" where codes are the features themselves (`projection_type` null).
    """

    heads: int | None = Field(default=None, ge=1)
    facet: Literal["features", "keys"] | None = None
    head: Literal["nonlinear", "linear", "none"] | None = None


class _Said(Block):
    """Settings in a checkpoint that decide how its network computes, in the authors' words."""

    arch: Literal["dino"] = "dino"
    dino_feat_type: Literal["feat", "KK"] = "feat"
    projection_type: Literal["nonlinear", "linear"] | None = None


def import_checkpoint(checkpoint: ForeignCheckpoint, options: Mapping[str, Any]) -> Imported:
    """Trunk, head and both probes of an official checkpoint.

    Which cluster is which class no file says; the authors match them anew whenever they evaluate.

    Args:
        checkpoint: with the names of the authors' code, and its settings where it has any.
        options: fields of `ImportOptions`.

    Raises:
        ModelError: another network, missing tensors, or sizes that do not belong together.
        SettingsError: an option that does not exist or a wrong value, there or in the file's own settings.
    """
    chosen = parse(dict(options), ImportOptions, source="the options of `lexiseg import stego`")
    official = checkpoint.tensors
    if "cluster_probe.clusters" not in official:
        some = ", ".join(sorted(official)[:3])
        raise ModelError(
            found=f"{checkpoint.file} is no STEGO checkpoint: no cluster_probe.clusters, but {some}, …",
            allowed="a checkpoint of mhamilton723/STEGO, with keys `net.…`, `cluster_probe.…` and `linear_probe.…`",
            fix="check the file; a DINO file alone is a trunk, to be named in `encode.trunk` of params.yaml",
        )
    training = _training(checkpoint)
    said = _said(checkpoint, training)
    kind = chosen.head or _head_kind(official, training, said)
    official_of, dropped, unexpected = _names(official, kind=kind)
    tensors = {ours: official[name] for ours, name in official_of.items()}
    facet = chosen.facet or _FACETS[said.dino_feat_type]
    try:
        trunk = _trunk(official, heads=chosen.heads, facet=facet)
        config = _config(official, kind=kind, dataset=training.get("dataset_name"))
        with torch.device("meta"):  # for names and sizes alone
            own = {f"{_TRUNK}{name}": value for name, value in build_trunk(trunk).state_dict().items()}
            expected = {**own, **build(config).state_dict()}
    except (KeyError, RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
        raise ModelError(
            found=f"{checkpoint.file} has no complete STEGO network ({type(error).__name__}: {_line(error)})",
            allowed="all tensors of one network: net.model.* (a DINO ViT), net.cluster1.*, net.cluster2.*, both probes",
            fix="fetch the file again, or name another one",
        ) from error
    missing = sorted(expected.keys() - tensors.keys())
    wrong = [
        f"{official_of[name]} {tuple(tensors[name].shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    if missing or wrong:
        faults = [f"{len(missing)} tensors missing (in our words {_some(missing)})"] * bool(missing)
        faults += [f"{len(wrong)} of another size ({_some(wrong)})"] * bool(wrong)
        raise ModelError(
            found=f"{checkpoint.file}: {'; '.join(faults)}",
            allowed="all tensors of the network that the others are of",
            fix="fetch the file again; give what the sizes do not tell (--set head=…)",
        )
    unexpected = sorted([*unexpected, *(official_of[name] for name in tensors.keys() - expected.keys())])
    whole = {name: tensors[name].to(value.dtype) for name, value in expected.items()}
    return Imported(
        config=config,
        tensors={name: value for name, value in whole.items() if not name.startswith(_TRUNK)},
        text_dim=None,
        clip=None,
        dropped=dropped,
        unexpected=tuple(unexpected),
        licence=LICENCE,
        needs_clip=True,
        trunk=(trunk, {n.removeprefix(_TRUNK): value for n, value in whole.items() if n.startswith(_TRUNK)}),
        training=training,
        graph=_graph(config, training),
        notes=_notes(config, training),
    )


def our_name(official: str) -> str | None:
    """Our name for an official tensor, with `trunk.` before those of the trunk; None for what is left out on purpose.

    Raises:
        KeyError: the importer does not know the name.
    """
    for pattern, ours in _KEYS:
        match = re.fullmatch(pattern, official)
        if match:
            return None if ours is None else match.expand(ours)
    raise KeyError(official)


def _names(official: Mapping[str, Tensor], *, kind: str) -> tuple[dict[str, str], dict[str, int], list[str]]:
    """Our names -> official ones; how many are left out on purpose, by the start of their names; unknown ones."""
    official_of: dict[str, str] = {}
    dropped: dict[str, int] = {}
    unexpected = []
    for name in official:
        try:
            ours = our_name(name)
        except KeyError:
            unexpected.append(name)
            continue
        # The authors' code makes a linear map even where nothing goes through it.
        if ours is None or (kind == "none" and ours.startswith("head.linear.")):
            start = name.rsplit(".", 1)[0]
            dropped[start] = dropped.get(start, 0) + 1
        else:
            official_of[ours] = name
    return official_of, dropped, unexpected


def _training(checkpoint: ForeignCheckpoint) -> dict[str, Any]:
    """The settings of the training that are worth keeping, in the authors' words."""
    settings = checkpoint.settings.get("cfg", checkpoint.settings)
    settings = settings if isinstance(settings, Mapping) else {}
    found = {name: settings[name] for name in _NOTED if name in settings}
    return {name: value for name, value in found.items() if value is None or isinstance(value, (str, int, float))}


def _said(checkpoint: ForeignCheckpoint, training: dict[str, Any]) -> _Said:
    values = {name: training[name] for name in _Said.model_fields if name in training}
    return parse(values, _Said, source=f"the settings in {checkpoint.file}")


def _head_kind(official: Mapping[str, Tensor], training: Mapping[str, Any], said: _Said) -> str:
    if "projection_type" in training:
        return said.projection_type or "none"
    return "nonlinear" if any(name.startswith("net.cluster2.") for name in official) else "linear"


def _trunk(official: Mapping[str, Tensor], *, heads: int | None, facet: str) -> dict[str, Any]:
    """trunk.json, from the sizes of the tensors."""
    width, _, patch, _ = official["net.model.patch_embed.proj.weight"].shape
    depth = len({match[1] for name in official if (match := re.match(r"net\.model\.blocks\.(\d+)\.", name))})
    hidden = official["net.model.blocks.0.mlp.fc1.weight"].shape[0]
    places = official["net.model.pos_embed"].shape[1] - 1
    side = math.isqrt(places)
    if side**2 != places:
        raise ValueError(f"net.model.pos_embed has positions for {places} patches, which are no square")
    heads = heads or max(1, width // 64)
    name = _TRUNK_NAMES.get((width, depth, patch))
    options: dict[str, Any] = {}
    if name is None or hidden != 4 * width or heads != width // 64:
        options = {"embed_dim": width, "depth": depth, "num_heads": heads, "mlp_ratio": hidden / width}
        options |= {"patch_size": patch}
    if side * patch != 224:
        options["img_size"] = side * patch
    return {
        "source": "timm",
        "name": name or "vit_small_patch16_224",
        "options": options,
        "facet": facet,
        "positions": "dino",
        "mean": list(IMAGENET_DEFAULT_MEAN),
        "std": list(IMAGENET_DEFAULT_STD),
        "licence": TRUNK_LICENCE,
    }


def _config(official: Mapping[str, Tensor], *, kind: str, dataset: Any) -> dict[str, Any]:
    """model.json, from the sizes of the tensors."""
    features = official["net.model.norm.weight"].shape[0]
    dim = features if kind == "none" else official["net.cluster1.0.weight"].shape[0]
    clusters, count = official["cluster_probe.clusters"].shape[0], official["linear_probe.weight"].shape[0]
    return {
        "method": "stego",
        # The authors' code has the chance of 0.1 in its text, not in its settings.
        "head": {"features": features, "dim": dim, "kind": kind, "dropout": 0.1},
        "clusters": clusters,
        "classes": _class_names(dataset, count),
        "names": None,
        "vocabulary": Vocabulary(names=cluster_names(clusters)).to_json(),
        "stand_ins": {},
        "backbone": {"source": "timm", "licence": TRUNK_LICENCE},
        "predict": _predict(),
        "refine": RefineSettings().model_dump(mode="json"),
    }


def _class_names(dataset: Any, count: int) -> list[str]:
    for start, names in _CLASSES.items():
        if str(dataset).startswith(start) and len(names) == count:
            return list(names)
    return [f"class {number}" for number in range(count)]


def _predict() -> dict[str, Any]:
    # Whole pictures, with mirror images as in the authors' evaluation; a side of at most 512 keeps to the sizes that
    # their crops of 320 pixels have.
    return PredictSettings(flip=True, max_side=512).model_dump(mode="json")


def _graph(config: Mapping[str, Any], training: Mapping[str, Any]) -> dict[str, Any]:
    """Changes of the block `stego` of params.yaml: the model as it is, evaluated as the authors do.

    What the file says of its training is there for a training that goes on.
    """
    head = config["head"]
    blocks: dict[str, Any] = {
        "model": {"head": head["kind"], "dim": head["dim"], "dropout": head["dropout"]},
        "probe": {"kind": "model", "clusters": config["clusters"]},  # the number is for k-means beside it
        "predict": dict(_EVALUATION),
        "refine": config["refine"],
        "features": {"crop": 224, "filter": "nearest"},
        "loss": {},
        "train": {},
        "neighbours": {},
    }
    for official, ours in _RECIPE.items():
        if _is_number(value := training.get(official)):
            block, _, key = ours.partition(".")
            blocks[block][key] = ("code" if value else "none") if key == "centring" else value
    if all(_is_number(training.get(official)) for official in _WEIGHTS):
        blocks["loss"] |= {"shifts": "fixed", **{ours: training[official] for official, ours in _WEIGHTS.items()}}
    return {name: block for name, block in blocks.items() if block}


def _notes(config: Mapping[str, Any], training: Mapping[str, Any]) -> tuple[str, ...]:
    clusters, classes = config["clusters"], len(config["classes"])
    beyond = f", {clusters - classes} more than classes" if clusters > classes else ""
    said = ", ".join(f"{name} {value}" for name, value in training.items())
    known = "" if said else "; the file has no settings, so the sizes alone decided (--set heads=…, facet=…, head=…)"
    return (
        f"{clusters} clusters{beyond}; a linear probe of {classes} classes ({config['classes'][0]}, …){known}",
        *([f"trained, as the file says, with {said}"] if said else []),
        "which cluster is which class, the file does not say: they are called cluster 0, cluster 1, …; to name them, "
        "evaluate the model on a labelled data set in the graph (--profile NAME, then dvc repro), which matches them "
        "with classes; or, without labels, let the stage stego-name do it by a CLIP (--text FOLDER)",
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float))


def _some(names: list[str], *, most: int = 3) -> str:
    return ", ".join(names[:most]) + ("" if len(names) <= most else f" and {len(names) - most} more")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
