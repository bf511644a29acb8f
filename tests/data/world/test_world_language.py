import re

from lexiseg.data.world import World
from lexiseg.data.world.recipe import Recipe
from lexiseg.settings import override, parse

RELATIONS = ("left of", "right of", "above", "below")
_COLOURS = re.compile(r"\b(red|yellow|green|blue|purple|orange|white|black)\b")
_OBJECTS = re.compile(r"\ba (?!patch)")


def _fits(words: str, thing) -> bool:
    return set(words.split()) <= {thing.size, thing.colour, thing.pattern, thing.name}


def _on_side(thing, other, relation: str) -> bool:
    (x, y), (other_x, other_y) = thing.centre, other.centre
    return {"left of": x < other_x, "right of": x > other_x, "above": y < other_y, "below": y > other_y}[relation]


def _split_relation(text: str) -> tuple[str, str, str]:
    for relation in RELATIONS:
        before, found, after = text.partition(f" {relation} the ")
        if found:
            return before, relation, after
    return text, "", ""


def test_words_and_lengths(world, train_scenes, val_scenes):
    allowed = set(world.words)
    assert world.words == tuple(sorted(allowed))
    assert 60 <= len(allowed) <= 70
    used, longest = set(), 0
    iconic = [world.render("iconic", index) for index in range(200)]
    for scene in [*train_scenes, *val_scenes, *iconic]:
        longest = max(longest, *(len(caption.split()) for caption in scene.captions))
        texts = [*scene.captions, *(phrase["text"] for phrase in scene.phrases)]
        texts += [f"{pair['question']} {pair['answer']}" for pair in scene.questions]
        assert all(text == " ".join(text.split()) and text for text in texts)
        used.update(" ".join(texts).split())
    assert used <= allowed
    assert allowed - used <= {"zero"}
    assert 24 <= longest <= 30


def test_number_of_captions(world, train_scenes, val_scenes):
    assert {len(scene.captions) for scene in (*train_scenes, *val_scenes)} == {5}
    assert {len(world.render("iconic", index).captions) for index in range(20)} == {3}


def test_mix_of_caption_forms(train_scenes):
    captions = [caption for scene in train_scenes for caption in scene.captions]
    rich = sum(" on " in caption for caption in captions) / len(captions)
    nouns = sum(not {"a", "on"} & set(caption.split()) for caption in captions) / len(captions)
    assert 0.36 < rich < 0.44
    assert 0.3 < nouns < 0.45  # some partial captions mention stuff only
    rich_captions = [caption for caption in captions if " on " in caption]
    coloured = sum(len(_COLOURS.findall(caption)) for caption in rich_captions)
    things = sum(len(_OBJECTS.findall(caption)) for caption in rich_captions)
    assert 0.64 < coloured / things < 0.76


def test_full_captions_say_everything(val_scenes):
    cut = 0
    for scene in val_scenes:
        words = scene.captions[0].split()
        assert all(item.name in words for item in (*scene.regions, *scene.things) if item.said)
        said = [thing for thing in scene.things if thing.said]
        told = [thing.size in words and thing.colour in words for thing in said]
        told += [thing.pattern in words for thing in said if thing.pattern != "plain"]
        cut += not all(told)
        assert words.count("a") == len(said) + ("patch" in words)
        if len(said) > 1:
            assert any(f" {relation} a " in scene.captions[0] for relation in RELATIONS)
    assert cut <= 3  # only where the limit of words is met


def test_phrases_fit_exactly_their_segments(val_scenes):
    seen = set()
    for scene in val_scenes:
        assert len({phrase["text"] for phrase in scene.phrases}) == len(scene.phrases) <= 4
        segments = {segment["id"] for segment in scene.segments}
        for phrase in scene.phrases:
            assert set(phrase["segment_ids"]) <= segments
            article, _, text = phrase["text"].partition(" ")
            words, relation, anchor = _split_relation(text)
            fitting = [thing for thing in scene.things if _fits(words, thing)]
            if relation:
                (other,) = [thing for thing in scene.things if thing.name == anchor]
                fitting = [thing for thing in fitting if _on_side(thing, other, relation)]
            fitting += [region for region in scene.regions if region.name == text]
            assert [item.segment_id for item in fitting] == phrase["segment_ids"]
            assert (len(fitting) == 1) == (article == "the")
            seen |= {article, relation}
    assert seen == {"the", "every", "", *RELATIONS}


def test_answers_are_right(world, val_scenes):
    answers = set()
    for scene in val_scenes:
        assert len(scene.questions) <= 5
        there = {item.name: item for item in (*scene.regions, *scene.things)}
        for pair in scene.questions:
            question, answer = pair["question"], pair["answer"]
            answers.add(answer)
            last = question.split()[-1]
            if question.startswith("is there"):
                assert (last in there) == (answer == "yes")
            elif question.startswith("how many"):
                assert answer == ("zero", "one", "two", "three", "four")[len(scene.things)]
            elif re.match("what (colour|pattern) is", question):
                assert answer == getattr(there[last], question.split()[1])
            else:
                relation = question.removeprefix("what is ").removesuffix(f" the {last}")
                others = [thing for thing in scene.things if thing is not there[last]]
                assert [thing.name for thing in others if _on_side(thing, there[last], relation)] == [answer]
    assert {"yes", "no", "plain", "striped", "red", "one", "three", "ring"} <= answers


def test_iconic_captions(world):
    captions = [c for index in range(300) for c in world.render("iconic", index).captions]
    assert all(" and " not in caption for caption in captions)
    with_thing = [caption for caption in captions if caption.startswith("a ")]
    assert 0.4 < sum(" on " in caption for caption in with_thing) / len(with_thing) < 0.6


def test_long_captions_are_shortened_from_the_end(plain_recipe):
    limit = override(plain_recipe, {"language.max_words": 21})
    world = World(parse(limit, Recipe))
    scenes = [world.render("val", index) for index in range(60)]
    assert max(len(caption.split()) for scene in scenes for caption in scene.captions) == 21
    for scene in scenes:
        assert all(thing.name in scene.captions[0].split() for thing in scene.things if thing.said)
