"""What `lexiseg ablate tcl` compares: tables of variants, each with what changes against params.yaml."""

from __future__ import annotations

from typing import Any

Variants = dict[str, dict[str, Any]]


def _without(*losses: str) -> dict[str, Any]:
    return {f"tcl.loss.{name}": 0.0 for name in losses}


# The paper's ablation: each row has one part more than the one above. Before the first stands the same CLIP without a
# grounder, the baseline `maskclip`.
PARTS: Variants = {
    # The decoder's gates are shut before training: masks are finer, and nothing is learned.
    "+ decoder, untrained": {"tcl.train.steps": 0},
    "+ TCL_v": _without("feature", "area", "smooth"),
    "+ TCL_f": _without("area", "smooth"),
    "+ area": _without("smooth"),
    "+ smooth (as set)": {},
    "+ PAMR": {"tcl.refine.pamr_iterations": 10},
    "+ knowledge": {"tcl.refine.pamr_iterations": 10, "tcl.refine.knowledge_weight": 0.3},
}

# What a picture is contrasted with: its caption, as in the paper, or one of the class names that its captions mention.
TEXTS: Variants = {
    "captions (as set)": {},
    "nouns": {"tcl.train.text": "noun"},
}

TABLES: dict[str, Variants] = {"parts": PARTS, "texts": TEXTS}
