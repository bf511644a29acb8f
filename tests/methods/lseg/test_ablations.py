import pytest
from helpers.tiny import settings

from lexiseg.methods.lseg.ablations import BLOCKS, CONTROLS, TABLES


@pytest.mark.parametrize(("table", "name"), [(table, name) for table in TABLES for name in TABLES[table]])
def test_every_variant_is_a_setting(table, name):
    assert settings(TABLES[table][name]).lseg


def test_the_blocks_are_those_of_the_papers_table():
    found = [settings(changes).lseg.model for changes in BLOCKS.values()]
    assert [(model.block, model.block_depth) for model in found] == [
        ("none", 1),
        *((block, depth) for block in ("bottleneck", "depthwise") for depth in (1, 2, 4)),
    ]


def test_what_the_variants_are():
    plain, paper, scratch = (settings(CONTROLS[name]).lseg for name in ("as set", "paper's network", "from scratch"))
    assert plain == settings().lseg
    assert plain.model.clip_residual
    assert not paper.model.clip_residual
    assert paper.model.init == "backbone"
    assert paper.train == plain.train
    assert (scratch.model.init, scratch.model.clip_residual) == ("random", False)
    # Nothing that was learned is there to be kept: the backbone learns at the full rate.
    assert scratch.train.backbone_lr_factor == 1.0
