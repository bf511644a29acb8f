"""The block `stego` of params.yaml."""

import re

import pytest
from helpers.tiny import settings
from helpers.working_tree import SOURCE

from lexiseg.errors import SettingsError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": "no_such_card"}, "one of the cards: "),
        ({"baselines": ["raw", "raw"]}, "each of them once"),
        ({"model.init": "pretrained"}, "random, or a model folder such as models/stego"),
        ({"model.init": "models/stego"}, "`sha256` goes with a model folder in `init`"),
        ({"model.sha256": "0" * 64}, "`sha256` goes with a model folder in `init`"),
        ({"loss.shifts": "fixed"}, "`shifts: fixed` needs self_shift, knn_shift and random_shift"),
        ({"loss.self_shift": 0.2}, "any other rule finds them"),
        ({"loss.self": 0.0, "loss.knn": 0.0, "loss.random": 0.0}, "at least one weight above 0: self, knn or random"),
        ({"predict.crop": 320}, "`crop` and `max_side` both set the size of a picture"),
        ({"probe.kind": "model"}, "`probe.kind: model` takes the probes of a model folder"),
        ({"train.steps": 0}, "`train.steps: 0` leaves a random head"),
        ({"model.head": "whitened"}, "`model.head: whitened` has nothing to learn: set `train.steps: 0`"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message):
    with pytest.raises(SettingsError) as caught:
        settings({f"stego.{key}": value for key, value in changes.items()})
    assert message in str(caught.value)


def test_what_goes_together_is_taken():
    found = settings({"stego.model.head": "whitened", "stego.train.steps": 0}).stego
    assert (found.model.head, found.train.steps) == ("whitened", 0)
    shifts = {"self_shift": 0.18, "knn_shift": 0.12, "random_shift": 0.46}
    found = settings({"stego.loss.shifts": "fixed", **{f"stego.loss.{key}": b for key, b in shifts.items()}}).stego
    assert (found.loss.self_shift, found.loss.knn_shift, found.loss.random_shift) == (0.18, 0.12, 0.46)


def test_the_card_says_how_clusters_were_matched_and_refined():
    stego = settings({"stego.match.unmatched": "majority", "stego.predict.flip": True}).stego
    matching = {"split": "evaluated", "unmatched": "majority", "clusters": 3}
    assert stego.match.card(clusters=3) == {"matching": matching}
    assert stego.predict.card() == {"flips": True, "centre_crop": None, "crop_filter": "bilinear", "max_side": 512}
    assert stego.refine.card() == {"refinement": "none"}
    stego = settings({"stego.match.split": "val", "stego.refine.crf_iterations": 10}).stego
    assert stego.match.card(clusters=3) == {"matching": {"split": "val", "unmatched": "error", "clusters": 3}}
    assert stego.refine.card()["refinement"]["crf_iterations"] == 10


def test_the_page_lists_the_knobs_worth_sweeping_with_their_ranges():
    text = (SOURCE / "params.yaml").read_text(encoding="utf-8")
    expected, path = {}, []
    for line in text.splitlines():
        # A comment may go on in the line below its key.
        if match := re.match(r"( *)(\w+):", line):
            path = [*path[: len(match[1]) // 2], match[2]]
        if path[:1] == ["stego"] and (sweep := re.search(r"sweep ([^;]+)$", line)):
            expected[".".join(path)] = sweep[1].strip()
    page = (SOURCE / "src/lexiseg/methods/stego/README.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^\| `(stego\.[\w.]+)` \| ([^|]+?) \|", page, flags=re.MULTILINE))
    assert expected
    assert shown == expected
