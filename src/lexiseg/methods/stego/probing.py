"""Fitting what reads classes out of codes: cluster centres without labels, a linear probe with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexiseg.data.manifest import read_manifest
from lexiseg.errors import DataError
from lexiseg.evaluation.coarse import evaluated_classes
from lexiseg.evaluation.protocol import load_protocol
from lexiseg.methods.stego.batches import ProbeBatches
from lexiseg.methods.stego.build import load_probes
from lexiseg.methods.stego.features import FeatureStore, Pieces
from lexiseg.methods.stego.model import Stego
from lexiseg.methods.stego.module import ProbeTraining
from lexiseg.methods.stego.probes import kmeans
from lexiseg.methods.stego.settings import ModelSettings, ProbeSettings
from lexiseg.storage import read_json
from lexiseg.training import fit
from lexiseg.vocabulary import Vocabulary

_USAGE_CELLS = 200_000  # feature vectors by which the use of the clusters is measured


@dataclass(frozen=True, eq=False)
class Fitted:
    """A model with its probes.

    Attributes:
        model: the whole model.
        classes: names of the linear probe's classes; empty without one.
        curve: rows of the probes' trainings; empty where none was needed.
        usage: share of the cells that each cluster wins, 0..1, N numbers.
        mean_cosine: of a code with its cluster's centre, what the clustering maximises.
    """

    model: Stego
    classes: tuple[str, ...]
    curve: list[dict[str, float]]
    usage: list[float]
    mean_cosine: float


def fit_probes(
    head: nn.Module,
    config: Mapping[str, Any],
    *,
    store: FeatureStore,
    pieces: Pieces,
    prepared: Path,
    settings: ProbeSettings,
    protocol: str,
    seed: int,
) -> Fitted:
    """Find cluster centres on the codes, and train the linear probe where the card reads labels and pieces have them.

    The linear probe learns from the labels of all classes, unseen ones too: it measures what codes hold, and is part of
    no model that finds them.

    Args:
        head: features -> codes, frozen.
        config: `head` of its model.json.
        store, pieces: features, and the pictures that they are of.
        prepared: output of the stage prepare.
        settings: `stego.probe`, of the kind kmeans or gradient.
        protocol: name of the card that says which classes there are.
        seed: of the graph; `stego.probe.seed` changes it for the probes alone.

    Raises:
        DataError: fewer feature vectors than clusters, or no number of clusters: it is null and there are no classes.
    """
    seed = seed + 1_000_003 * settings.seed
    vocabulary, card = Vocabulary.from_json(read_json(prepared / "vocabulary.json")), load_protocol(protocol)
    classes = evaluated_classes(card, vocabulary)
    count = (settings.clusters or len(classes.names)) + settings.extra
    if not settings.clusters and not len(classes.names):
        raise DataError(
            found="`stego.probe.clusters: null`, one per class, for a data set without classes",
            allowed="a number of clusters",
            fix="set `stego.probe.clusters` in params.yaml, such as 12",
        )
    if store.cells < count:
        raise DataError(
            found=f"{store.cells} feature vectors for {count} clusters",
            allowed="at least as many as clusters",
            fix="add pictures, or ask for fewer clusters (`stego.probe.clusters`, `stego.probe.extra`)",
        )
    reads = settings.linear and card.labelled and len(classes.names)
    labelled = _labelled(pieces, prepared) if reads else []
    torch.manual_seed(seed)
    model = Stego(head, dim=config["dim"], clusters=count, classes=len(classes.names) if labelled else 0)  # type: ignore[arg-type]
    curves = []
    how: dict[str, Any] = {"size": settings.batch, "seed": seed}
    if settings.kind == "kmeans":
        generator = torch.Generator().manual_seed(seed)
        codes = codes_of(head, store.sample(settings.tokens, generator=generator))
        found, _ = kmeans(
            codes, clusters=count, restarts=settings.restarts, iterations=settings.iterations, generator=generator
        )
        model.probe.centres.data.copy_(found)
    else:
        batches = ProbeBatches(store, pieces, list(range(len(pieces))), classes=None, **how)
        module = ProbeTraining(clusters=model.probe, linear=None, head=head, settings=settings)
        curves.append(fit(module, batch=batches, steps=settings.steps, seed=seed, title="probe clusters"))
    if labelled:
        batches = ProbeBatches(store, pieces, labelled, classes=classes, **how)
        module = ProbeTraining(clusters=None, linear=model.linear, head=head, settings=settings)
        curves.append(fit(module, batch=batches, steps=settings.steps, seed=seed, title="probe linear"))
    head.cpu()  # no part of the modules that learned, which moved it to where they are
    curve = [{key: value for row in rows for key, value in row.items()} for rows in zip(*curves, strict=True)]
    return _described(model, classes.names if labelled else (), curve, store, seed)


def loaded_probes(
    settings: ModelSettings,
    head: nn.Module,
    config: Mapping[str, Any],
    *,
    store: FeatureStore,
    seed: int,
    linear: bool = True,
) -> Fitted:
    """The probes of the model folder that the head is from, as they are.

    Args:
        settings: `stego.model`.
        head: features -> codes.
        config: `head` of its model.json.
        store: features.
        seed: of those by which the use of the clusters is measured.
        linear: keep the linear probe, too.

    Raises:
        ModelError: not that folder, or probes for codes of another size.
    """
    model, names = load_probes(settings, head, config)
    if not linear:
        model.linear, names = None, ()
    return _described(model, names, [], store, seed)


@torch.no_grad()
def codes_of(head: nn.Module, tokens: Tensor) -> Tensor:
    """Codes (T, K) of feature vectors (T, D)."""
    return head(tokens.T[None, :, :, None])[0, :, :, 0].T


def _described(
    model: Stego, classes: tuple[str, ...], curve: list[dict[str, float]], store: FeatureStore, seed: int
) -> Fitted:
    generator = torch.Generator().manual_seed(seed)
    tokens = store.sample(_USAGE_CELLS, generator=generator)
    unit = F.normalize(codes_of(model.head, tokens), dim=1)
    cosines, owner = (unit @ F.normalize(model.probe.centres.detach(), dim=1).T).max(dim=1)
    shares = owner.bincount(minlength=len(model.probe.centres)).double() / len(owner)
    usage = [round(value, 6) for value in shares.tolist()]
    return Fitted(model, tuple(classes), curve, usage, round(float(cosines.mean()), 6))


def _labelled(pieces: Pieces, prepared: Path) -> list[int]:
    """Numbers of the pieces whose picture has labels; only the manifest is read."""
    with_labels = {
        row["id"]
        for row in read_manifest(prepared / "manifest.parquet")
        if row["split"] == pieces.split and row["readable"] and row["label_values"]
    }
    return [number for number in range(len(pieces)) if pieces.picture_id(number) in with_labels]
