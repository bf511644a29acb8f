"""Use a trained model: pictures and words in, segmentations out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from lexiseg.data.adapters.files import picture_pixels, pixel_limit, read_picture
from lexiseg.errors import DataError, LabelError, ModelError
from lexiseg.methods import METHODS, load_refiner, load_scorer
from lexiseg.phases import phase
from lexiseg.pictures import MOST_PANELS, mask_sheet, overlay
from lexiseg.segmentation import ImageLike, NamedLabels, Segmentation, check_labels
from lexiseg.storage import atomic_path, read_json, write_json

MAX_PIXELS = 50_000_000
_ENDS = (".png", "_overlay.png", ".json", "_masks.png", "_masks")


class Model:
    """A model folder, loaded.

    Example:
        >>> model = lexiseg.load("outputs/lseg/register")
        >>> result = model.segment("photo.jpg", ["grass", "sky"])
        >>> result.area("sky")
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._scorer: Any = load_scorer(folder)
        self._refine = load_refiner(folder)
        method = METHODS[read_json(folder / "model.json")["method"]]
        self._overlapping, self._clusters = method.overlapping, method.clusters

    @property
    def own_labels(self) -> tuple[str, ...]:
        """The names that the model gives without being asked: those of its clusters; empty for other methods."""
        return tuple(dict.fromkeys(self._scorer.names)) if self._clusters else ()

    def segment(
        self, image: ImageLike, labels: Sequence[str] | NamedLabels | None = None, *, protocol: str | None = None
    ) -> Segmentation:
        """Divide one picture among the labels, any number and order of them.

        Where labels may overlap ("red ring", "ring"; with TCL), each has a soft mask of its own, `Segmentation.mask`.

        Args:
            image: path, PIL image, or uint8 RGB array (H, W, 3).
            labels: one or more different names. None: `own_labels`, for methods that have them (STEGO).
            protocol: hash of a protocol card to note in the result.

        Raises:
            LabelError: no labels, empty or repeated ones, a word the text side has no vector for, or two words
                that are the same to it.
            DataError: the picture cannot be read, or is no uint8 RGB array.
        """
        with phase("text"):
            names = self.check_labels(labels)
        with phase("decode"):
            pixels = _as_array(image)
        if self._clusters:
            with phase("head"):
                label_map, scores = self._scorer.segment(pixels, names, refine=self._refine)
            return Segmentation(labels=names, label_map=label_map, scores=scores, protocol=protocol)
        with phase("vision"):
            scores = self._scorer.scores([pixels], names)[0]
        with phase("head"):
            if self._refine is not None:
                scores = self._refine(scores, pixels)
            return Segmentation.from_scores(
                labels=names,
                scores=scores,
                height=pixels.shape[0],
                width=pixels.shape[1],
                protocol=protocol,
                overlapping=self._overlapping,
            )

    def check_labels(self, labels: Sequence[str] | NamedLabels | None = None) -> tuple[str, ...]:
        """The labels as a tuple, if this model can tell them apart; None: its own.

        Raises:
            LabelError: see `segment`.
        """
        if labels is None:
            if not self._clusters:
                raise LabelError(
                    found=f"no labels for {self.folder}",
                    allowed="words to look for; only a model of clusters (STEGO) has names of its own",
                    fix='name what to look for, such as --labels "grass, sky"',
                )
            return self.own_labels
        names = check_labels(labels)
        if self._clusters:
            self._scorer.owners(names)  # raises where they cannot be understood
            return names
        same: dict[bytes, list[str]] = {}
        for name, vector in zip(names, self._scorer.text.embed(names), strict=True):
            same.setdefault(vector.numpy().tobytes(), []).append(name)
        alike = [group for group in same.values() if len(group) > 1]
        if alike:
            unknown = list(dict.fromkeys(word for words in self.unknown_words(names).values() for word in words))
            raise LabelError(
                found="; ".join(f"the labels {_some(group)} have one and the same text vector" for group in alike),
                allowed="labels that differ to the text encoder: of equal ones, only the first would win pixels"
                + (f"; it has never seen {_some(unknown)}" if unknown else ""),
                fix="keep one of them",
            )
        return names

    def stand_ins(self, labels: Sequence[str]) -> dict[str, str]:
        """For each label without a vector of its own: the row of the text table that stands in for it."""
        if self._scorer.text is None:
            return {}
        found = {label: self._scorer.text.stand_in(label) for label in labels}
        return {label: row for label, row in found.items() if row}

    def unknown_words(self, labels: Sequence[str]) -> dict[str, list[str]]:
        """For each label with any: the words the text encoder has never seen (where it can know)."""
        if self._scorer.text is None:
            return {}
        with phase("text"):
            found = {label: self._scorer.text.unknown_words(label) for label in labels}
        return {label: words for label, words in found.items() if words}


def _some(words: Sequence[str], *, most: int = 5) -> str:
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def load(folder: str | Path) -> Model:
    """Load a model folder. `lexiseg.load` also takes the MLflow address of a registered model.

    Raises:
        ModelError: not a model folder, or one that is being made anew.
    """
    try:
        return Model(Path(folder))
    except FileNotFoundError as error:
        raise ModelError(
            found=f"{error.filename} went away while the model was read",
            allowed="a model folder that stays as it is",
            fix="let the `dvc repro` or flow that makes it anew end, then repeat",
        ) from error


def parse_labels(text: str) -> tuple[str, ...]:
    """ "grass, sky" -> ("grass", "sky").

    Raises:
        LabelError: see `check_labels`.
    """
    return check_labels([part.strip() for part in text.split(",")] if text.strip() else [])


def predict_files(
    model: Model, images: Sequence[Path], labels: Sequence[str] | None, *, out: Path
) -> Iterator[dict[str, Any]]:
    """Segment picture files and write, for each: <stem>.png (label indices), <stem>_overlay.png, <stem>.json.

    Where labels may overlap, also <stem>_masks.png, all soft masks to look at, and <stem>_masks/<index>.png with their
    values (8 bits, 255 is 1).

    All pictures are looked for before the first is segmented. Pictures whose results would have the same names are
    numbered, and no result takes the place of one of the pictures.

    Yields:
        The content of each JSON: `{"image", "size", "model", "labels": [{"index", "label", "area", "score"}],
        "unknown_words", "stand_ins"}`; area is the share of the picture and score the mean probability there (null
        where the label covers nothing), both 0..1. Where labels may overlap, score is the mean of the soft mask there,
        and each label has "mask", its mask's file, and "mask_area", the share of the picture where that is above 0.5.

    Raises:
        DataError: a picture is missing, cannot be read, or would be overwritten.
        LabelError: see `Model.segment`.
    """
    names = model.check_labels(labels)
    missing = [str(path) for path in images if not path.is_file()]
    if missing:
        raise DataError(
            found=f"no picture {', '.join(missing)}", allowed="paths of picture files", fix="check the paths"
        )
    results = _result_files(images, out)
    deep = np.uint8 if len(names) <= 256 else np.uint16
    quiet = len(images) < 5
    for path, (label_map, coloured, table, sheet, folder) in zip(
        tqdm(images, desc="predict", unit="image", disable=quiet, mininterval=1), results, strict=True
    ):
        pixels = _as_array(path)
        result = model.segment(pixels, names)
        _save_picture(label_map, result.label_map.astype(deep))
        _save_picture(coloured, overlay(pixels, result.label_map, result.labels))
        areas = _write_masks(result, pixels, sheet=sheet, folder=folder) if result.overlapping else []
        content = {
            "image": str(path),
            "size": {"height": pixels.shape[0], "width": pixels.shape[1]},
            "model": str(model.folder),
            "labels": [
                {"index": index, "label": label, "area": result.area(label), "score": result.mean_score(label)}
                | ({"mask": f"{folder.name}/{index}.png", "mask_area": areas[index]} if areas else {})
                for index, label in enumerate(result.labels)
            ],
            "unknown_words": model.unknown_words(result.labels),
            "stand_ins": model.stand_ins(result.labels),
        }
        write_json(table, content)
        yield content


def _write_masks(result: Segmentation, pixels: np.ndarray, *, sheet: Path, folder: Path) -> list[float]:
    """The mask of each label as a file, and the first of them as one picture; returns the share of each above 0.5."""
    areas, shown = [], []
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        # One after the other: all of them at full size may not fit into memory.
        for index, label in enumerate(result.labels):
            mask = result.mask(label)
            areas.append(float((mask > 0.5).mean()))
            Image.fromarray((255 * mask).round().astype(np.uint8)).save(temporary / f"{index}.png")
            if index < MOST_PANELS:
                shown.append(mask)
    _save_picture(sheet, mask_sheet(pixels, shown, result.labels))
    return areas


def _result_files(images: Sequence[Path], out: Path) -> list[tuple[Path, ...]]:
    """Label map, overlay, JSON, sheet and folder of masks of every picture, all different."""
    used: set[Path] = set()
    results = []
    for path in images:
        stem, number = path.stem, 1
        while used & set(files := tuple(out / f"{stem}{end}" for end in _ENDS)):
            number += 1
            stem = f"{path.stem}_{number}"
        used.update(files)
        results.append(files)
    sources = {path.resolve() for path in images}
    # The folder of masks is replaced as a whole.
    within = sources | {parent for source in sources for parent in source.parents}
    lost = sorted(str(file) for file in used if file.resolve() in (sources if file.suffix else within))
    if lost:
        raise DataError(
            found=f"the result would overwrite the picture {', '.join(lost)}",
            allowed="a folder for the results that holds none of the pictures",
            fix="name another folder, such as --out predictions",
        )
    return results


def _save_picture(path: Path, pixels: np.ndarray) -> None:
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")


def _as_array(image: ImageLike) -> np.ndarray:
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise DataError(
                found=f"an array of shape {image.shape} and type {image.dtype}",
                allowed="uint8 RGB (H, W, 3) with at least one pixel",
                fix="convert it, for instance with PIL.Image.fromarray(...).convert('RGB')",
            )
        return image
    if isinstance(image, Image.Image):
        with pixel_limit(MAX_PIXELS):
            return picture_pixels(image, name="the picture")
    with pixel_limit(MAX_PIXELS):
        picture = read_picture(Path(image), file=str(image)).image
    assert picture is not None  # read_picture always decodes
    return picture
