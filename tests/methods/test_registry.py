import json

import pytest

from lexiseg.errors import ModelError
from lexiseg.methods import BASELINES, METHODS, load_scorer, resolve
from lexiseg.settings import Block


@pytest.mark.parametrize("name", METHODS)
def test_every_part_of_a_method_is_there(name):
    method = METHODS[name]
    assert callable(resolve(method.load))
    for reference in method.stages.values():
        assert callable(resolve(reference))
    if method.settings:
        assert issubclass(resolve(method.settings), Block)  # type: ignore[arg-type]
    if method.ablations:
        assert isinstance(resolve(method.ablations), dict)


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_is_there(name):
    assert callable(resolve(BASELINES[name]))


@pytest.mark.parametrize(
    ("content", "found", "allowed"),
    [
        (None, "no model.json", "a model folder"),
        ('{"method": "unet"}', "'unet'", "lseg"),
        ('{"weights": 3}', "KeyError", "names its method"),
        ("[1, 2]", "TypeError", "names its method"),
        ('{"method": "ls', "JSONDecodeError", "names its method"),
        (b"\xff\xfe\x00", "UnicodeDecodeError", "names its method"),
    ],
)
def test_a_wrong_folder(tmp_path, content, found, allowed):
    if content is not None:
        (tmp_path / "model.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelError) as caught:
        load_scorer(tmp_path)
    assert found in caught.value.found
    assert str(tmp_path) in caught.value.found
    assert allowed in caught.value.allowed
    assert caught.value.fix


def test_what_is_asked_for_reaches_the_method(tmp_path, monkeypatch):
    seen = {}
    (tmp_path / "model.json").write_text(json.dumps({"method": "lseg"}))
    monkeypatch.setattr("lexiseg.methods.resolve", lambda reference: lambda folder, **more: seen.update(more))
    load_scorer(tmp_path, encode=tmp_path / "encode", predict={"resize": None})
    assert seen == {"encode": tmp_path / "encode", "predict": {"resize": None}}
