"""The block `tcl` of params.yaml."""

import re

import pytest
from helpers.tiny import settings
from helpers.working_tree import SOURCE

from lexiseg.errors import SettingsError


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("loss.positive_prior", 1.2),
        ("loss.positive_prior", -0.1),
        ("loss.negative_prior", 1.01),
        ("refine.background_threshold", 1.5),
        ("refine.background_threshold", 0.0),
        ("refine.knowledge_weight", -0.3),
    ],
)
def test_shares_outside_0_to_1_are_refused(key, value):
    with pytest.raises(SettingsError) as caught:
        settings({f"tcl.{key}": value})
    assert f"tcl.{key}" in str(caught.value)


def test_the_page_lists_the_knobs_worth_sweeping_with_their_ranges():
    text = (SOURCE / "params.yaml").read_text(encoding="utf-8")
    block = text[text.index("\ntcl:") :].splitlines()
    expected, path = {}, []
    for line in block:
        # A comment may go on in the line below its key.
        if match := re.match(r"( *)(\w+):", line):
            path = [*path[: len(match[1]) // 2], match[2]]
        if path[:1] == ["tcl"] and (sweep := re.search(r"sweep ([^;]+)$", line)):
            expected[".".join(path)] = sweep[1].strip()
    page = (SOURCE / "src/lexiseg/methods/tcl/README.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^\| `(tcl\.[\w.]+)` \| ([^|]+?) \|", page, flags=re.MULTILINE))
    assert shown == expected
