"""Checkpoints of the official implementations -> model folders like those that the graph registers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lexiseg
from lexiseg.encoders.openai_clip import save_openai_clip
from lexiseg.encoders.text import copy_text, load_text
from lexiseg.encoders.trunk import trunk_sha256
from lexiseg.errors import LabelError, ModelError
from lexiseg.foreign import read_checkpoint
from lexiseg.methods import METHODS, Imported, resolve
from lexiseg.segmentation import check_labels
from lexiseg.settings import override
from lexiseg.storage import atomic_path, read_json, save_tensors, write_json
from lexiseg.vocabulary import Vocabulary
from lexiseg.workspace import model_identity, setting_path


@dataclass(frozen=True)
class ImportReport:
    """What became of a checkpoint.

    Attributes:
        folder: the model folder.
        used: number of tensors that the network took.
        dropped: tensors left out on purpose, counted by the start of their names.
        unexpected: names that the importer does not know.
        unread: classes in the file whose objects were read as plain tables.
        text: where the label vectors come from.
        settings: changes of params.yaml with which the graph evaluates the model as it is, nested; None where the model
            needs label vectors and its text side is no CLIP with a ViT.
        notes: what else there is to know.
    """

    folder: Path
    used: int
    dropped: Mapping[str, int]
    unexpected: tuple[str, ...]
    unread: tuple[str, ...]
    text: str
    settings: Mapping[str, Any] | None
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The report in words, a line per fact."""
        lines = [f"{self.used} tensors used, none missing"]
        lines += [f"left out, as nothing computes with it: {name}.* ({n} tensors)" for name, n in self.dropped.items()]
        lines += [f"unexpected, not used: {name}" for name in self.unexpected]
        lines += [f"read as plain data, without its code: {name}" for name in self.unread]
        return [*lines, *self.notes, f"text side: {self.text}", f"written to {self.folder}"]


def import_model(
    method: str,
    file: Path,
    *,
    out: Path,
    text: Path | None = None,
    classes: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    licence: str | None = None,
) -> ImportReport:
    """Turn an official checkpoint into a model folder.

    Args:
        method: name in the registry.
        file: the checkpoint; see `lexiseg.foreign.read_checkpoint`.
        out: the folder to write, which must not exist.
        text: encode or model folder whose text side is taken; None: the CLIP inside the checkpoint, or none where the
            method takes no label vectors.
        classes: names that the model was trained with, to be noted in its vocabulary.json; of a method of clusters,
            those of its linear probe.
        options: what the method's importer cannot find in the file.
        licence: of the weights, where it is another one than the method's importer states.

    Raises:
        ModelError: a method without an importer, a file that is not its checkpoint, or no text side that fits.
        SettingsError: wrong options.
        LabelError: faulty class names, or another number of them than the model has.
    """
    entry = METHODS.get(method)
    if entry is None or entry.importer is None:
        raise ModelError(
            found=f"no importer for `{method}`",
            allowed=", ".join(name for name, known in METHODS.items() if known.importer),
            fix="name one of these",
        )
    if out.exists():
        raise ModelError(found=f"{out} exists", allowed="a new folder", fix="name another one with --out, or remove it")
    vocabulary = Vocabulary(names=check_labels(classes)) if classes else None
    checkpoint = read_checkpoint(file)
    imported: Imported = resolve(entry.importer)(checkpoint, options or {})
    trunk_config, trunk = imported.trunk or ({}, {})
    tensors = {**imported.tensors, **trunk}
    not_finite = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
    if not_finite:
        raise ModelError(
            found=f"{file} holds values that are not finite, in {', '.join(not_finite[:3])}",
            allowed="a trained network",
            fix="take an earlier checkpoint of that training: it diverged",
        )
    licence = licence or imported.licence
    config = dict(imported.config)
    if METHODS[method].clusters:
        if vocabulary:
            config["classes"] = _probe_classes(vocabulary, config["classes"], file=file)
        vocabulary = Vocabulary.from_json(config["vocabulary"])
    else:
        config["backbone"] = {**config["backbone"], "licence": licence}
    licences = {"weights": licence, "code": "Apache-2.0"}
    with atomic_path(out) as folder:
        folder.mkdir()
        origin = _write_text(folder, imported, text)
        if origin is not None:
            encoder = load_text(folder)
            licences["text"] = encoder.licence
            if imported.text_dim not in (None, encoder.dim):
                raise ModelError(
                    found=f"label vectors of {encoder.dim} numbers ({origin}) for a network of {imported.text_dim}",
                    allowed="the text encoder that the network was trained with",
                    fix="name an encode or model folder that has it: --text FOLDER",
                )
        save_tensors(folder / "model.safetensors", dict(imported.tensors))
        if trunk:
            write_json(folder / "trunk" / "trunk.json", trunk_config)
            save_tensors(folder / "trunk" / "model.safetensors", dict(trunk))
            licences["trunk"] = trunk_config["licence"]
            config["backbone"] = {**config["backbone"], "sha256": trunk_sha256(folder / "trunk")}
        write_json(folder / "model.json", config)
        if vocabulary:
            write_json(folder / "vocabulary.json", vocabulary.to_json())
        source: dict[str, Any] = {"file": checkpoint.file, "sha256": checkpoint.sha256, "licence": licence}
        source["unexpected"] = list(imported.unexpected)
        if imported.training:
            source["training"] = dict(imported.training)
        package = f"lexiseg {lexiseg.__version__}"
        card = {"method": method, "package": package, "imported": source, "licences": licences}
        write_json(folder / "card.json", card)
    return ImportReport(
        folder=out,
        used=len(tensors),
        dropped=imported.dropped,
        unexpected=imported.unexpected,
        unread=checkpoint.unread,
        text=origin or "none, it takes no label vectors",
        settings=_graph_settings(method, out, imported),
        notes=imported.notes,
    )


def _probe_classes(given: Vocabulary, classes: Sequence[str], *, file: Path) -> list[str]:
    if len(given) != len(classes):
        raise LabelError(
            found=f"{len(given)} class names for the linear probe in {file}, which has {len(classes)} classes",
            allowed=f"{len(classes)} names, in the order of the labels that it was trained with",
            fix="give them all, or leave --classes out",
        )
    return list(given.names)


def _graph_settings(method: str, folder: Path, imported: Imported) -> dict[str, Any] | None:
    place, start = setting_path(folder), {"sha256": model_identity(folder)}
    own: dict[str, Any] = {"run": True, "model": {"init": place, **start}, "train": {"steps": 0}}
    others = {name: {"run": False} for name in METHODS if name != method}
    # The CLIP in the folder is the graph's then.
    clip = {"source": "model", "weights": place, **start, **dict.fromkeys(("model", "licence"))}
    has_clip = _has_vit(folder / "clip" / "clip.json")
    if METHODS[method].clusters:
        trunk = {"source": "model", "weights": place, **start, **dict.fromkeys(("name", "licence", "mean", "std"))}
        encode: dict[str, Any] = {"trunk": trunk}
        if has_clip:
            encode |= {"clip": clip, "text": {"source": "clip"}}
        return {"encode": encode, **others, method: override(own, imported.graph)}
    if not has_clip:
        return None
    config = imported.config
    own["model"] = {**config["model"], **own["model"]}
    if method == "lseg":
        own["train"]["epochs"] = None
    templates = read_json(folder / "text" / "text.json")["templates"]
    backbone = dict.fromkeys(("name", "weights", "sha256", "licence", "mean", "std"))
    return {
        # Its own dense embeddings are the baseline.
        "encode": {
            "clip": clip,
            "text": {"source": "clip", "templates": "bare" if templates == ["{}"] else "vocabulary"},
            "backbone": {"source": "clip", **backbone},
        },
        "baselines": ["maskclip"],
        **others,
        method: own | {key: config[key] for key in ("predict", "refine") if key in config},
    }


def _has_vit(clip_file: Path) -> bool:
    """Whether it describes a CLIP whose image tower can be read densely."""
    # A ResNet has a list of layers. No baseline can read it, and no other text side can be named by the folder.
    if not clip_file.is_file():
        return False
    return not isinstance(read_json(clip_file)["model"].get("vision_cfg", {}).get("layers"), list)


def _write_text(folder: Path, imported: Imported, text: Path | None) -> str | None:
    """Write the text side; returns where it comes from, in words, or None where there is none."""
    if text is not None:
        file = text / "text" / "text.json"
        if not file.is_file():
            raise ModelError(
                found=f"{text} has no text/text.json",
                allowed="an encode or model folder, such as outputs/encode",
                fix="name the right one",
            )
        copy_text(text, folder)
        source = read_json(file)["source"]
        if imported.needs_clip and not (source == "clip" and _has_vit(text / "clip" / "clip.json")):
            raise ModelError(
                found=f"{text} has no CLIP with a ViT: its label vectors are of the source {source}",
                allowed="a folder with a CLIP, image tower included"
                + ("" if imported.text_dim is None else ": the one that the network was trained on"),
                fix="name one that has it, such as outputs/encode after `encode.clip` was set to that CLIP",
            )
        if imported.needs_clip and imported.text_dim is not None:
            _write_templates(folder, imported, licence=read_json(file)["licence"])
        return f"that of {text.name}"
    if imported.text_dim is None:
        return None
    if imported.clip is None:
        raise ModelError(
            found="the checkpoint carries no CLIP, so nothing would turn words into vectors",
            allowed="a checkpoint with the text encoder in it, or a folder that has one",
            fix="name the folder: --text outputs/encode, where `encode` was run with that CLIP",
        )
    (folder / "clip").mkdir()
    config = save_openai_clip(folder / "clip", imported.clip)
    _write_templates(folder, imported, licence=config["licence"])
    return f"the CLIP in the checkpoint ({config['model']['embed_dim']} numbers per label)"


def _write_templates(folder: Path, imported: Imported, *, licence: str) -> None:
    """Labels go into the CLIP in the folder as in the official code."""
    config = {"source": "clip", "licence": licence, "templates": list(imported.templates)}
    if imported.average != "unit":
        config["average"] = imported.average
    write_json(folder / "text" / "text.json", config)
