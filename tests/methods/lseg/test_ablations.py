import pytest
from helpers.tiny import settings

from lexiseg.methods.lseg.ablations import VARIANTS


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_a_setting(name):
    assert settings(VARIANTS[name]).lseg


def test_what_the_variants_are():
    plain, paper, scratch = (settings(VARIANTS[name]).lseg for name in ("as set", "paper's network", "from scratch"))
    assert plain == settings().lseg
    assert plain.model.clip_residual
    assert not paper.model.clip_residual
    assert paper.model.init == "backbone"
    assert paper.train == plain.train
    assert (scratch.model.init, scratch.model.clip_residual) == ("random", False)
    # Nothing that was learned is there to be kept: the backbone learns at the full rate.
    assert scratch.train.backbone_lr_factor == 1.0
