"""A working tree whose models are registered; made once for a file of tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.serving import client_of
from helpers.working_tree import copy_of, run


@pytest.fixture(scope="module")
def registered(_finished_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Versions 1 of lexiseg-lseg, lexiseg-tcl and lexiseg-stego; that of lseg is in production."""
    tree = copy_of(_finished_tree, tmp_path_factory.mktemp("registered") / "lexiseg")
    run(tree, "lexiseg", "sync")
    client_of(tree).set_registered_model_alias("lexiseg-lseg", "production", "1")
    return tree
