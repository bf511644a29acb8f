"""Protocol cards: what a number means. Two numbers may be compared when their cards have the same hash."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lexiseg.errors import LexisegError, SettingsError
from lexiseg.settings import Block, parse, read_yaml
from lexiseg.storage import sha256_of_json
from lexiseg.vocabulary import Vocabulary

_CLASSES = Path(__file__).parent / "classes"
_CARDS = Path(__file__).parent / "protocols"
ANY_DATASET = ANY_SIZE = "any"
EVALUATED = "evaluated"  # the split that a matching is made on, where it is each split's own


class ProtocolError(LexisegError):
    """A protocol card cannot be used, or results under different cards were about to be compared."""


class Background(Block):
    """How pixels that none of the named classes fits are treated.

    Attributes:
        policy: "none": every pixel gets the best of the classes. "threshold": a pixel whose highest
            probability (its soft mask; of methods whose labels compete, softmax over the classes other than
            `label`, at the resolution of the scores) stays below `threshold` gets `label`.
        threshold: 0..1, null with the policy "none".
        label: the class of the vocabulary that stands for background.
    """

    policy: Literal["none", "threshold"] = "none"
    threshold: float | None = None
    label: str = "background"

    @model_validator(mode="after")
    def _agree(self) -> Background:
        if (self.policy == "threshold") != (self.threshold is not None):
            raise ValueError('threshold goes with the policy "threshold", and null with "none"')
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise ValueError("threshold must be between 0 and 1")
        return self


class Refinement(Block):
    """What was done to soft masks before they were compared (TCL).

    Attributes:
        pamr_iterations: of PAMR; 0: none.
        knowledge_weight: share of the untrained CLIP's own masks, 0..1.
    """

    pamr_iterations: int = Field(ge=0)
    knowledge_weight: float = Field(ge=0, le=1)


class CrfRefinement(Block):
    """The dense CRF that scores of clusters went through before they were compared (STEGO).

    Attributes:
        crf_iterations: of the mean field.
        gaussian_width: standard deviation of the kernel of distance, in pixels.
        gaussian_weight: its weight.
        bilateral_width: standard deviation of the kernel of distance and colour, in pixels.
        bilateral_colour: the same in colour, in steps of 0..255.
        bilateral_weight: its weight.
    """

    crf_iterations: int = Field(ge=1)
    gaussian_width: float = Field(gt=0)
    gaussian_weight: float = Field(ge=0)
    bilateral_width: float = Field(gt=0)
    bilateral_colour: float = Field(gt=0)
    bilateral_weight: float = Field(ge=0)


class Matching(Block):
    """How clusters got the names of classes.

    Attributes:
        split: whose labels name them, by Hungarian matching; "evaluated": each split's own.
        unmatched: what becomes of clusters beyond the number of classes, see `lexiseg.evaluation.matching`.
        clusters: how many there are: other numbers do not compare. A card leaves it null, `resolve` fills it.
    """

    split: str
    unmatched: Literal["error", "majority"]
    clusters: Annotated[int, Field(ge=1)] | None = None


class ProtocolCard(Block):
    """Everything that decides what a metric means. A card can only state what the code does.

    Attributes:
        name: name of the card.
        version: counted up when the card changes.
        dataset: data set (or adapter) the card is made for; "any" is replaced by the data set's name.
        label_set: names among which every pixel chooses: "all", or only the "seen" or "unseen" ones. Pixels
            whose true class is outside the set are ignored.
        templates: sentences into which names were put before they were encoded; filled by `resolve`.
        background: see `Background`.
        ignore_label: marks pixels that count nowhere.
        absent_class: a class that is neither in the truth nor in the prediction of the whole split is left
            out of means ("exclude") or counts as 0 ("zero").
        resolution: "labels": scores are upsampled bilinearly to the size of the label image, then each pixel takes the
            best class.
        sliding_window: null: the whole image at once; otherwise side of the windows in pixels; where they overlap,
            scores are averaged. Filled by `resolve`, like the next three.
        flips: whether the scores of the mirrored image were added.
        scales: sizes of the image, relative to the one that the method takes, whose scores were added.
        refinement: see `Refinement` and `CrfRefinement`; "none": no post-processing of scores or masks.
        vocabulary_hash: filled by `resolve`.
        boundary_tolerance: of the boundary F-score, share of the image diagonal; filled by `resolve`.
        episodes: null: all names of the label set compete at every pixel. Otherwise a picture is asked about one
            class of its own at a time, in two labels, "others" and the class (see `lexiseg.data.episodes`), after
            picture and labels were brought to this [height, width]; "any": to the one of the settings, filled by
            `resolve`.
        base_size: long side in pixels that scale 1 means; null: the method's own choice. Filled by `resolve`.
        short_side: short side in pixels that images are scaled to; null: see `base_size`. Filled by `resolve`.
        window_stride: pixels between windows; null: 2/3 of their side. Filled by `resolve`.
        align_corners: of the upsampling; false as in mmsegmentation.
        class_list: the list in `evaluation/classes` that the vocabulary has to be, together with the background's label
            where the card has one; null: any.
        matching: null: names are given by text or by training. For methods of clusters see `Matching`; "any": as the
            settings say, filled by `resolve`.
        coarse: null: the classes are those of the vocabulary; otherwise the coarse ones that they are parts of, see
            `lexiseg.evaluation.coarse`.
        centre_crop: null: whole pictures. Otherwise picture and labels are scaled to this short side in pixels, labels
            by the nearest one, and their centre square is evaluated; filled by `resolve`.
        crop_filter: how pictures are scaled to `centre_crop`: bilinearly, or by the nearest pixel; filled by `resolve`.
        max_side: of methods of clusters: longer side in pixels that pictures are scaled down to before the network;
            null: no limit. Filled by `resolve`; other methods do not state theirs.
        labelled: false: nothing is compared with labels; of methods of clusters only, which can be described without.
    """

    name: str
    version: int = Field(ge=1)
    dataset: str
    label_set: Literal["all", "seen", "unseen"]
    background: Background
    ignore_label: Literal[-100]
    absent_class: Literal["exclude", "zero"]
    resolution: Literal["labels"]
    sliding_window: int | None
    flips: bool
    scales: tuple[float, ...]
    refinement: Literal["none"] | Refinement | CrfRefinement
    vocabulary_hash: str | None = None
    templates: tuple[str, ...] | None = None
    boundary_tolerance: float | None = None
    episodes: tuple[int, int] | Literal["any"] | None = None
    base_size: int | None = None
    short_side: int | None = None
    window_stride: int | None = None
    align_corners: bool = True
    class_list: str | None = None
    matching: Literal["any"] | Matching | None = None
    coarse: Literal["cocostuff27", "cityscapes27", "potsdam3", "stuff_and_thing"] | None = None
    centre_crop: Annotated[int, Field(ge=1)] | None = None
    crop_filter: Literal["bilinear", "nearest"] = "bilinear"
    max_side: Annotated[int, Field(ge=1)] | None = None
    labelled: bool = True

    @model_validator(mode="after")
    def _agree(self) -> ProtocolCard:
        if not self.labelled and self.matching is not None:
            raise ValueError("labelled: false goes with matching: null, as clusters are named by labels")
        if self.of_clusters and (self.background.policy != "none" or self.episodes is not None):
            raise ValueError("a card of clusters has no background and no episodes")
        if self.coarse is not None and (self.matching is None or self.label_set != "all"):
            raise ValueError("coarse classes go with a matching and with label_set: all")
        return self

    @property
    def of_clusters(self) -> bool:
        """Whether the card is for methods whose classes are clusters; the others fit no such card."""
        return self.matching is not None or not self.labelled

    def resolve(
        self,
        *,
        vocabulary: Vocabulary,
        dataset: str,
        adapter: str | None = None,
        templates: tuple[str, ...],
        boundary_tolerance: float,
        episodes: tuple[int, int] | None = None,
        inference: Mapping[str, Any] | None = None,
    ) -> ProtocolCard:
        """The card as applied to one data set; only such a card has a hash.

        Args:
            vocabulary: the data set's class names.
            dataset: the data set's name.
            adapter: the adapter that read it; a card made for the adapter fits too.
            templates: those in use; none for a table of vectors, which was made with templates of its own.
            boundary_tolerance: share of the image diagonal, see `lexiseg.evaluation.boundary`.
            episodes: the setting `evaluate.episodes`.
            inference: how the method made the scores: `sliding_window`, `flips`, `scales`, `refinement` and the like,
                where they are not those of one pass over the whole image; `background_threshold` where the method
                sets its own; and `matching` of a method of clusters, which no other method has, with their number.

        Raises:
            ProtocolError: the card is for another data set or kind of method, asks for classes that the vocabulary
                lacks, or asks in another way than the predictions were made.
        """
        made = dict(inference or {})
        self.check(dataset=dataset, adapter=adapter, episodes=episodes)
        self.check_clusters(clusters="matching" in made)
        self._check_names(vocabulary)
        names = [vocabulary.names[index] for index in self.classes(vocabulary)]
        if not names and self.labelled:
            raise ProtocolError(
                found=f"the protocol {self.name!r} evaluates {self.label_set} classes, of which there are none",
                allowed="a label set with at least one class of the vocabulary",
                fix="choose a card with `label_set: all`"
                if len(vocabulary)
                else "list the classes of the data set in its classes.txt, or choose a card that needs no labels",
            )
        if self.background.policy != "none" and self.background.label not in names:
            raise ProtocolError(
                found=f"the protocol {self.name!r} uses the class {self.background.label!r} as background",
                allowed=f"one of the classes it evaluates: {', '.join(names)}",
                fix="name another class in the card, or set its background policy to none",
            )
        if isinstance(done := made.get("refinement"), Mapping):
            made["refinement"] = (CrfRefinement if "crf_iterations" in done else Refinement)(**done)
        made |= self._matching(made.pop("matching", None))
        return self.model_copy(
            update={
                "dataset": dataset,
                "vocabulary_hash": vocabulary.hash,
                "templates": templates,
                "boundary_tolerance": boundary_tolerance,
                "episodes": episodes,
                "background": self._background(made.pop("background_threshold", None)),
                **made,
            }
        )

    def _matching(self, asked: Mapping[str, Any] | None) -> dict[str, Any]:
        if asked is None or not self.labelled:
            return {}
        matching = Matching(**asked)
        fixed = self.matching
        if isinstance(fixed, Matching) and (fixed.split, fixed.unmatched) != (matching.split, matching.unmatched):
            raise ProtocolError(
                found=f"the protocol {self.name!r} with the matching {_listed(matching)}",
                allowed=f"{_listed(fixed)} with this card",
                fix="set `stego.match` in params.yaml, or `stego.protocol: clusters`, which leaves it to the settings",
            )
        return {"matching": matching}

    def _check_names(self, vocabulary: Vocabulary) -> None:
        if self.class_list is None:
            return
        background = (self.background.label,) if self.background.policy != "none" else ()
        expected = background + read_class_list(self.class_list)
        faults = {
            "without": [name for name in expected if name not in vocabulary.names],
            "with": [name for name in vocabulary.names if name not in expected],
        }
        found = [f"{how} {', '.join(some[:5])}{', …' if len(some) > 5 else ''}" for how, some in faults.items() if some]
        if found:
            raise ProtocolError(
                found=f"a vocabulary {' and '.join(found)}",
                allowed=f"the {len(expected)} names that the protocol {self.name!r} is about",
                fix=f"give the data set these names, spelt as there, or set {self._any_data}",
            )

    def _background(self, threshold: float | None) -> Background:
        if threshold is None:
            return self.background
        if self.background.policy == "none":
            raise ProtocolError(
                found=f"a background threshold of {threshold:g} under the protocol {self.name!r}, which uses none",
                allowed="a threshold with a card that has one",
                fix="set the method's `refine.background_threshold` to null",
            )
        return self.background.model_copy(update={"threshold": threshold})

    def check(self, *, dataset: str, adapter: str | None, episodes: tuple[int, int] | None) -> None:
        """Whether the card fits a data set and the way it is asked, which the settings alone tell.

        Raises:
            ProtocolError: it does not; the arguments are those of `resolve`.
        """
        if self.dataset not in (ANY_DATASET, dataset, adapter):
            raise ProtocolError(
                found=f"the protocol {self.name!r}, made for the data set {self.dataset!r}, on {dataset!r}",
                allowed=f"a card for {dataset!r} or for any data set",
                fix=f"set {self._any_data} in params.yaml, or add a card for this data set",
            )
        if episodes != self.episodes and (episodes is None or self.episodes != ANY_SIZE):
            raise ProtocolError(
                found=f"the protocol {self.name!r} with `evaluate.episodes: {_shown(episodes)}`",
                allowed=f"`evaluate.episodes: {_shown(self.episodes)}` with this card",
                fix="set it in params.yaml, or choose another `evaluate.protocol`; `episodes` fits any data set that "
                "is asked about one class at a time, `generic` any other",
            )

    @property
    def _any_data(self) -> str:
        return "`stego.protocol: clusters`" if self.of_clusters else "`evaluate.protocol: generic`"

    def check_clusters(self, *, clusters: bool) -> None:
        """Whether the card fits a method whose classes are clusters, or one whose classes have names.

        Raises:
            ProtocolError: it does not.
        """
        if clusters and not self.of_clusters:
            raise ProtocolError(
                found=f"the protocol {self.name!r}, for methods that know names, for a method of clusters",
                allowed="a card that says how clusters get their names (`matching`), or one without labels",
                fix="set `stego.protocol: clusters`, which fits any labelled data set, or `unlabelled`",
            )
        if self.of_clusters and not clusters:
            raise ProtocolError(
                found=f"the protocol {self.name!r}, for methods of clusters, for a method without any",
                allowed="a card whose names are given by text or training (`matching: null`, `labelled: true`)",
                fix="set `evaluate.protocol: generic`, which fits any labelled data set; methods of clusters have a "
                "setting of their own, `stego.protocol`",
            )

    def classes(self, vocabulary: Vocabulary) -> tuple[int, ...]:
        """Ids of the vocabulary's classes among which pixels choose, before they are made coarse."""
        wanted = {"all": (True, False), "seen": (True,), "unseen": (False,)}[self.label_set]
        return tuple(index for index, seen in enumerate(vocabulary.seen) if seen in wanted)

    @property
    def hash(self) -> str:
        """Hex sha256 of the resolved card.

        Raises:
            ProtocolError: the card is not resolved, so its numbers would have no definite meaning yet.
        """
        if self.vocabulary_hash is None or self.boundary_tolerance is None:
            raise ProtocolError(
                found=f"the hash of the protocol {self.name!r} asked for before the data set is known",
                allowed="a card that was applied to a vocabulary",
                fix="call resolve() on the card first",
            )
        return sha256_of_json(self._content())

    def entry(self) -> dict[str, Any]:
        """What stands beside every metric: {"name", "hash", "card"}."""
        return {"name": self.name, "hash": self.hash, "card": self._content()}

    def _content(self) -> dict[str, Any]:
        # These fields came later: cards that do not use them keep their hashes.
        names = ("episodes", "base_size", "short_side", "window_stride", "align_corners", "class_list")
        names += ("matching", "coarse", "centre_crop", "crop_filter", "max_side", "labelled")
        later = {name for name in names if getattr(self, name) == type(self).model_fields[name].default}
        return self.model_dump(mode="json", exclude=later)


def read_class_list(name: str) -> tuple[str, ...]:
    """The class names of a benchmark without its background, in mmsegmentation's order and spelling."""
    return tuple((_CLASSES / f"{name}.txt").read_text(encoding="utf-8").splitlines())


def protocol_names() -> list[str]:
    """Names of the cards that come with lexiseg."""
    return sorted(path.stem for path in _CARDS.glob("*.yaml"))


def load_protocol(name: str) -> ProtocolCard:
    """A card by name.

    Raises:
        SettingsError: there is no such card, or its file has faults.
    """
    if name not in protocol_names():
        raise SettingsError(
            found=f"the protocol {name!r}",
            allowed=f"one of the cards: {', '.join(protocol_names())}",
            fix="set `evaluate.protocol` in params.yaml to one of them; `generic` fits any data set",
        )
    path = _CARDS / f"{name}.yaml"
    return parse(read_yaml(path), ProtocolCard, source=path.name)


def require_same_protocol(a: ProtocolCard | Mapping[str, Any], b: ProtocolCard | Mapping[str, Any]) -> None:
    """Refuse to compare results under different protocols.

    Args:
        a: a resolved card, or the "protocol" entry of a metrics.json.
        b: the same for the other result.

    Raises:
        ProtocolError: the hashes differ; the message names every field that does.
    """
    first, second = (value.entry() if isinstance(value, ProtocolCard) else value for value in (a, b))
    if first["hash"] == second["hash"]:
        return
    ours, theirs = first.get("card", {}), second.get("card", {})
    fields = [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]
    differences = "; ".join(f"{key}: {ours.get(key)!r} and {theirs.get(key)!r}" for key in fields)
    raise ProtocolError(
        found=f"results under two protocols, {first['name']} ({first['hash'][:12]}) and "
        f"{second['name']} ({second['hash'][:12]}), which differ in {differences or 'their hash only'}",
        allowed="a comparison of results under one protocol",
        fix="evaluate both under the same card and data set (`evaluate.protocol` in params.yaml), then compare",
    )


def _shown(episodes: tuple[int, int] | str | None) -> str:
    if episodes == ANY_SIZE:
        return "[height, width]"
    return "null" if episodes is None else str(list(episodes))


def _listed(matching: Matching) -> str:
    return f"split: {matching.split}, unmatched: {matching.unmatched}"
