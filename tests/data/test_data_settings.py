import inspect

import pytest

from lexiseg.data.settings import DataSettings
from lexiseg.errors import SettingsError
from lexiseg.settings import parse


def test_defaults_are_the_embedded_world():
    data = parse({}, DataSettings)
    assert (data.name, data.adapter) == ("world", "world")
    assert data.required_splits == ("train", "val", "test")


def test_every_wrong_key_is_reported_at_once():
    with pytest.raises(SettingsError) as error:
        parse({"max_pixel": 5, "workers": 0, "name": "../x", "max_ignored_share": 1.5}, DataSettings)
    assert "4 fault(s)" in error.value.found
    assert "did you mean `max_pixels`?" in error.value.found
    for name in ("workers", "name", "max_ignored_share"):
        assert f"`{name}`" in error.value.found


def test_every_field_is_documented():
    text = inspect.getsource(DataSettings)
    for name in DataSettings.model_fields:
        line = text.split(f"    {name}: ")[1].split("\n", 1)[1]
        assert line.lstrip().startswith('"""')
