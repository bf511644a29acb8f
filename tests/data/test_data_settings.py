import pytest
from helpers.micro import settings

from lexiseg.data.settings import DataSettings
from lexiseg.errors import SettingsError
from lexiseg.settings import parse


def test_every_wrong_key_is_reported_at_once():
    values = settings().data.model_dump()
    values["max_pixel"] = values.pop("max_pixels")
    with pytest.raises(SettingsError) as error:
        parse({**values, "workers": 0, "name": "../x", "max_ignored_share": 1.5}, DataSettings)
    assert "5 fault(s)" in error.value.found
    assert "did you mean `max_pixels`?" in error.value.found
    for name in ("workers", "name", "max_ignored_share", "max_pixels"):
        assert f"`{name}`" in error.value.found
