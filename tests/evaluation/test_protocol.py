import pytest

from lexiseg.errors import SettingsError
from lexiseg.evaluation.protocol import (
    Background,
    Matching,
    ProtocolCard,
    ProtocolError,
    load_protocol,
    protocol_names,
    read_class_list,
    require_same_protocol,
)
from lexiseg.methods.lseg.settings import PredictSettings
from lexiseg.settings import parse
from lexiseg.vocabulary import Vocabulary

WORDS = Vocabulary(names=("sky", "ring", "background"), seen=(True, False, True))


def resolve(
    card: ProtocolCard,
    *,
    vocabulary=WORDS,
    dataset="world",
    templates=("{}",),
    boundary_tolerance=0.0075,
    inference=None,
) -> ProtocolCard:
    return card.resolve(
        vocabulary=vocabulary,
        dataset=dataset,
        templates=templates,
        boundary_tolerance=boundary_tolerance,
        inference=inference,
    )


def changed(card: ProtocolCard, **changes) -> ProtocolCard:
    return parse({**card.model_dump(), **changes}, ProtocolCard, source="a test")


@pytest.mark.parametrize("name", protocol_names())
def test_cards_load_and_are_named_like_their_files(name):
    card = load_protocol(name)
    assert card.name == name
    assert (card.scales, card.flips, card.sliding_window, card.refinement) == ((1.0,), False, None, "none")


def test_the_usual_cards_are_there():
    assert set(protocol_names()) == {
        *("camvid", "coco", "coco20i", "episodes", "fss", "generic", "pascal5i", "world"),
        *TCL_BENCHMARKS,
        *OF_CLUSTERS,
    }


# The data set, the coarse classes, and whether there are labels.
OF_CLUSTERS = {
    "world_clusters": ("world", None, True),
    "world_clusters11": ("world", "stuff_and_thing", True),
    "camvid_clusters": ("camvid", None, True),
    "cocostuff27": ("any", "cocostuff27", True),
    "cityscapes27": ("any", "cityscapes27", True),
    "potsdam3": ("any", "potsdam3", True),
    "clusters": ("any", None, True),
    "unlabelled": ("any", None, False),
}
MATCHING = {"split": "evaluated", "unmatched": "error", "clusters": 3}
CRF = {
    "crf_iterations": 10,
    "gaussian_width": 1.0,
    "gaussian_weight": 3.0,
    "bilateral_width": 67.0,
    "bilateral_colour": 3.0,
    "bilateral_weight": 4.0,
}

# Names, and whether there is a background among them.
TCL_BENCHMARKS = {
    "voc": (21, True),
    "voc20": (20, False),
    "context": (60, True),
    "context59": (59, False),
    "coco_object": (81, True),
    "coco_stuff": (171, False),
    "cityscapes": (19, False),
    "ade20k": (150, False),
}


@pytest.mark.parametrize("name", TCL_BENCHMARKS)
def test_the_benchmarks_of_tcl(name):
    count, background = TCL_BENCHMARKS[name]
    card = load_protocol(name)
    assert card.class_list is not None
    names = (("background",) if background else ()) + read_class_list(card.class_list)
    assert len(set(names)) == len(names) == count
    assert all(one == one.strip() and one for one in names)
    assert card.background.policy == ("threshold" if background else "none")
    assert card.background.threshold == (0.4 if background else None)
    assert not card.align_corners
    assert (card.dataset, card.ignore_label, card.absent_class) == ("any", -100, "exclude")
    assert resolve(card, vocabulary=Vocabulary(names=names), dataset="mine").dataset == "mine"


def test_a_card_with_a_list_of_classes_is_for_these_alone():
    names = list(read_class_list("voc20"))
    wrong = Vocabulary(names=tuple("dining table" if name == "diningtable" else name for name in names))
    with pytest.raises(ProtocolError, match="without diningtable and with dining table") as caught:
        resolve(load_protocol("voc20"), vocabulary=wrong, dataset="mine")
    assert "the 20 names that the protocol 'voc20' is about" in caught.value.allowed
    with pytest.raises(ProtocolError, match="without background"):
        resolve(load_protocol("voc"), vocabulary=Vocabulary(names=tuple(names)), dataset="mine")


def test_a_method_sets_the_threshold_where_there_is_a_background():
    vocabulary = Vocabulary(names=("background", *read_class_list("voc20")))
    card = resolve(load_protocol("voc"), vocabulary=vocabulary, inference={"background_threshold": 0.5})
    assert card.background.threshold == 0.5
    assert card.hash != resolve(load_protocol("voc"), vocabulary=vocabulary).hash
    assert resolve(load_protocol("voc"), vocabulary=vocabulary, inference={"background_threshold": None}).hash == (
        resolve(load_protocol("voc"), vocabulary=vocabulary).hash
    )
    with pytest.raises(ProtocolError, match=r"a background threshold of 0\.5 under the protocol 'generic'") as caught:
        resolve(load_protocol("generic"), inference={"background_threshold": 0.5})
    assert "background_threshold` to null" in caught.value.fix


def test_refinement_is_a_part_of_the_card():
    done = {"pamr_iterations": 10, "knowledge_weight": 0.3}
    card = resolve(load_protocol("generic"), inference={"refinement": done})
    assert card.hash != resolve(load_protocol("generic")).hash
    assert card.entry()["card"]["refinement"] == done
    assert parse(card.entry()["card"], ProtocolCard).hash == card.hash
    assert resolve(load_protocol("generic"), inference={"refinement": "none"}).hash == (
        resolve(load_protocol("generic")).hash
    )


@pytest.mark.parametrize("name", OF_CLUSTERS)
def test_cards_of_clusters(name):
    card = load_protocol(name)
    assert (card.dataset, card.coarse, card.labelled) == OF_CLUSTERS[name]
    assert card.matching == ("any" if card.labelled else None)
    assert card.of_clusters
    assert not card.align_corners
    assert (card.label_set, card.background.policy, card.centre_crop) == ("all", "none", None)


def test_other_cards_are_not_of_clusters():
    assert {name for name in protocol_names() if load_protocol(name).of_clusters} == set(OF_CLUSTERS)


def test_what_decides_numbers_of_clusters_is_on_the_card():
    card = load_protocol("clusters")

    def applied(card=card, **inference):
        return resolve(card, dataset="mine", templates=(), inference={"matching": MATCHING, **inference})

    hashes = {
        applied().hash,
        applied(changed(card, coarse="stuff_and_thing")).hash,
        applied(matching={**MATCHING, "split": "val"}).hash,
        applied(matching={**MATCHING, "unmatched": "majority"}).hash,
        applied(matching={**MATCHING, "clusters": 4}).hash,
        applied(centre_crop=320).hash,
        applied(centre_crop=320, crop_filter="nearest").hash,
        applied(max_side=512).hash,
        applied(flips=True).hash,
        applied(refinement=CRF).hash,
        applied(refinement={**CRF, "bilateral_colour": 5.0}).hash,
        applied(load_protocol("unlabelled")).hash,
    }
    assert len(hashes) == 12
    found = applied(refinement=CRF, centre_crop=320)
    entry = found.entry()["card"]
    assert (entry["matching"], entry["refinement"], entry["centre_crop"]) == (MATCHING, CRF, 320)
    assert {"coarse", "labelled", "crop_filter", "max_side"}.isdisjoint(entry)  # as on all cards that do not use them
    assert parse(entry, ProtocolCard).hash == found.hash
    assert applied(refinement="none").hash == applied().hash


def test_numbers_without_labels_do_not_depend_on_how_clusters_would_be_named():
    card, empty = load_protocol("unlabelled"), Vocabulary(names=())
    hashes = {
        resolve(card, vocabulary=empty, inference={"matching": {**MATCHING, "unmatched": unmatched}}).hash
        for unmatched in ("error", "majority")
    }
    assert len(hashes) == 1


def test_cards_of_before_keep_their_hashes():
    """Numbers that were published under them still compare."""
    refined = {"refinement": {"pamr_iterations": 10, "knowledge_weight": 0.3}}
    assert resolve(load_protocol("world")).hash == "b6813b16fc4760586368075e2efc387d3f72bb25113a246974fe85d00edb8bcb"
    found = resolve(load_protocol("generic"), inference=refined).hash
    assert found == "aad07f6e0887a1fd17cf14e3906912fa69d7a053aa7c486e47dbe09762d07f21"


@pytest.mark.parametrize("name", ["generic", "world"])
def test_clusters_need_a_card_of_clusters(name):
    card = load_protocol(name)
    for ask in (lambda: resolve(card, inference={"matching": MATCHING}), lambda: card.check_clusters(clusters=True)):
        with pytest.raises(ProtocolError, match=f"'{name}', for methods that know names, for a method of cl") as caught:
            ask()
        assert "`matching`" in caught.value.allowed
        assert "`stego.protocol: clusters`" in caught.value.fix
    card.check_clusters(clusters=False)


@pytest.mark.parametrize("name", ["clusters", "unlabelled"])
def test_a_card_of_clusters_needs_clusters(name):
    card = load_protocol(name)
    for ask in (lambda: resolve(card), lambda: card.check_clusters(clusters=False)):
        with pytest.raises(ProtocolError, match=f"'{name}', for methods of clusters, for a method without") as caught:
            ask()
        assert "text or training" in caught.value.allowed
        assert "`evaluate.protocol: generic`" in caught.value.fix
        assert "`stego.protocol`" in caught.value.fix
    card.check_clusters(clusters=True)


def test_a_card_may_say_itself_how_clusters_are_named():
    card = changed(load_protocol("clusters"), matching={"split": "evaluated", "unmatched": "error"})
    # It leaves the number of clusters open.
    assert resolve(card, inference={"matching": MATCHING}).matching == Matching(**MATCHING)
    with pytest.raises(ProtocolError) as caught:
        resolve(card, inference={"matching": {**MATCHING, "split": "val"}})
    assert "the matching split: val, unmatched: error" in caught.value.found
    assert "split: evaluated, unmatched: error" in caught.value.allowed
    assert "`stego.match`" in caught.value.fix


def test_a_card_of_clusters_for_other_data_is_refused():
    with pytest.raises(ProtocolError, match="'camvid_clusters', made for the data set 'camvid'") as caught:
        resolve(load_protocol("camvid_clusters"), inference={"matching": MATCHING})
    assert "`stego.protocol: clusters`" in caught.value.fix
    with pytest.raises(ProtocolError, match="with sky, ring, background") as caught:
        resolve(load_protocol("cocostuff27"), inference={"matching": MATCHING})
    assert "the 171 names" in caught.value.allowed
    assert "`stego.protocol: clusters`" in caught.value.fix


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labelled": False}, "labelled: false goes with matching: null"),
        ({"episodes": [8, 8]}, "no episodes"),
        ({"background": {"policy": "threshold", "threshold": 0.5, "label": "background"}}, "no background"),
        ({"coarse": "stuff_and_thing", "matching": None}, "coarse classes go with a matching"),
        ({"coarse": "stuff_and_thing", "label_set": "seen"}, "label_set: all"),
        ({"coarse": "pascal20"}, "coarse"),
        ({"matching": {"split": "val", "unmatched": "skip"}}, "unmatched"),
        ({"refinement": {**CRF, "crf_iterations": 0}}, "crf_iterations"),
        ({"centre_crop": 0}, "centre_crop"),
        ({"crop_filter": "bicubic"}, "crop_filter"),
        ({"max_side": 0}, "max_side"),
    ],
)
def test_a_card_of_clusters_that_contradicts_itself(changes, message):
    with pytest.raises(SettingsError, match=message):
        changed(load_protocol("clusters"), **changes)


def test_unknown_card_lists_the_cards():
    with pytest.raises(SettingsError, match="'pascal'") as caught:
        load_protocol("pascal")
    assert ", ".join(protocol_names()) in caught.value.allowed
    assert "evaluate.protocol" in caught.value.fix


def test_every_field_changes_the_hash():
    card = load_protocol("generic")
    hashes = {
        resolve(card).hash,
        resolve(changed(card, name="other")).hash,
        resolve(changed(card, version=2)).hash,
        resolve(card, dataset="mine").hash,
        resolve(changed(card, label_set="unseen")).hash,
        resolve(changed(card, absent_class="zero")).hash,
        resolve(changed(card, background={"policy": "threshold", "threshold": 0.3, "label": "background"})).hash,
        resolve(changed(card, background={"policy": "threshold", "threshold": 0.4, "label": "background"})).hash,
        resolve(card, boundary_tolerance=0.01).hash,
        resolve(card, templates=("a {}",)).hash,
        resolve(card, inference={"flips": True}).hash,
        resolve(card, inference={"scales": (0.5, 1.0)}).hash,
        resolve(card, inference={"sliding_window": 480}).hash,
        resolve(card, inference={"sliding_window": 480, "window_stride": 240}).hash,
        resolve(card, inference={"short_side": 480}).hash,
        resolve(changed(card, align_corners=False)).hash,
        resolve(card, vocabulary=Vocabulary(names=("sky", "background", "ring"), seen=(True, True, False))).hash,
        resolve(card, vocabulary=Vocabulary(names=WORDS.names)).hash,
    }
    assert len(hashes) == 18
    assert resolve(card).hash == resolve(load_protocol("generic")).hash


def test_hash_survives_json():
    entry = resolve(load_protocol("world")).entry()
    assert set(entry) == {"name", "hash", "card"}
    assert parse(entry["card"], ProtocolCard).hash == entry["hash"]


def test_hash_needs_a_data_set():
    with pytest.raises(ProtocolError, match="before the data set is known") as caught:
        _ = load_protocol("world").hash
    assert "resolve()" in caught.value.fix


def test_a_card_for_other_data_is_refused():
    with pytest.raises(ProtocolError, match="made for the data set 'camvid', on 'world'") as caught:
        resolve(load_protocol("camvid"))
    assert "any data set" in caught.value.allowed
    assert "generic" in caught.value.fix


def test_a_card_fits_the_adapter_too():
    card = load_protocol("camvid").resolve(
        vocabulary=WORDS, dataset="my-streets", adapter="camvid", templates=(), boundary_tolerance=0.01
    )
    # Two data sets read by one adapter are still two: their numbers do not compare.
    assert card.dataset == "my-streets"
    assert resolve(load_protocol("generic"), dataset="my-streets").dataset == "my-streets"


@pytest.mark.parametrize(("label_set", "ids"), [("all", (0, 1, 2)), ("seen", (0, 2)), ("unseen", (1,))])
def test_label_sets(label_set, ids):
    assert changed(load_protocol("generic"), label_set=label_set).classes(WORDS) == ids


def test_cards_of_episodes():
    def applied(name, episodes, *, vocabulary=WORDS):
        return load_protocol(name).resolve(
            vocabulary=vocabulary,
            dataset="mine",
            adapter="pascal5i",
            templates=("{}",),
            boundary_tolerance=0.01,
            episodes=episodes,
        )

    fold = Vocabulary(names=WORDS.names, seen=(False, True, True))
    hashes = {
        applied("generic", None).hash,
        applied("episodes", (8, 8)).hash,
        applied("episodes", (8, 16)).hash,
        applied("pascal5i", (480, 480)).hash,
        applied("pascal5i", (480, 480), vocabulary=fold).hash,
    }
    assert len(hashes) == 5
    assert applied("episodes", (8, 16)).entry()["card"]["episodes"] == [8, 16]
    assert "episodes" not in applied("generic", None).entry()["card"]  # as in numbers of before there were any


@pytest.mark.parametrize(
    ("name", "episodes", "found", "allowed"),
    [
        ("generic", (8, 8), "[8, 8]", "null"),
        ("episodes", None, "null", "[height, width]"),
        ("pascal5i", (8, 8), "[8, 8]", "[480, 480]"),
    ],
)
def test_a_card_and_the_settings_ask_alike(name, episodes, found, allowed):
    with pytest.raises(ProtocolError) as caught:
        load_protocol(name).resolve(
            vocabulary=WORDS,
            dataset="pascal5i",
            templates=("{}",),
            boundary_tolerance=0.01,
            episodes=episodes,
        )
    assert f"{name!r} with `evaluate.episodes: {found}`" in caught.value.found
    assert f"`evaluate.episodes: {allowed}`" in caught.value.allowed
    assert "evaluate.protocol" in caught.value.fix


def test_an_empty_label_set_is_refused():
    card = changed(load_protocol("generic"), label_set="unseen")
    with pytest.raises(ProtocolError, match="unseen classes, of which there are none") as caught:
        resolve(card, vocabulary=Vocabulary(names=("sky",)))
    assert "at least one class" in caught.value.allowed
    assert "label_set: all" in caught.value.fix


def test_a_data_set_without_classes():
    with pytest.raises(ProtocolError, match="all classes, of which there are none") as caught:
        resolve(load_protocol("generic"), vocabulary=Vocabulary(names=()))
    assert "classes.txt" in caught.value.fix


def test_background_has_to_be_a_class():
    card = changed(load_protocol("generic"), background={"policy": "threshold", "threshold": 0.5, "label": "void"})
    with pytest.raises(ProtocolError, match="'void' as background") as caught:
        resolve(card)
    assert "sky, ring, background" in caught.value.allowed
    assert "policy to none" in caught.value.fix


@pytest.mark.parametrize(
    "values",
    [{"policy": "threshold"}, {"policy": "none", "threshold": 0.5}, {"policy": "threshold", "threshold": 1.5}],
)
def test_background_threshold_goes_with_its_policy(values):
    with pytest.raises(SettingsError, match="threshold"):
        parse(values, Background)


@pytest.mark.parametrize(
    "change", [{"flips": "both"}, {"scales": 2}, {"sliding_window": [480]}, {"refinement": "pamr"}, {"size": 3}]
)
def test_a_card_cannot_claim_what_the_code_does_not_do(change):
    with pytest.raises(SettingsError, match=next(iter(change))):
        changed(load_protocol("generic"), **change)


def test_one_pass_is_what_a_card_says_by_itself():
    card, plain = load_protocol("generic"), PredictSettings().card()
    assert resolve(card, inference=plain).hash == resolve(card).hash


def test_numbers_of_clusters_do_not_compare():
    three, four = (
        resolve(load_protocol("clusters"), inference={"matching": {**MATCHING, "clusters": count}}) for count in (3, 4)
    )
    with pytest.raises(ProtocolError, match=r"which differ in matching: .*'clusters': 3.* and .*'clusters': 4"):
        require_same_protocol(three, four)


def test_results_under_two_protocols_are_not_compared():
    card = load_protocol("generic")
    one, other = resolve(card), resolve(changed(card, absent_class="zero", version=2))
    require_same_protocol(one, resolve(card).entry())
    with pytest.raises(ProtocolError) as caught:
        require_same_protocol(one.entry(), other)
    assert "absent_class: 'exclude' and 'zero'; version: 1 and 2" in caught.value.found
    assert one.hash[:12] in caught.value.found
    assert "one protocol" in caught.value.allowed
    assert "same card" in caught.value.fix
