"""What `lexiseg sweep tcl` searches: spaces by name, each a list of knobs (see `lexiseg.sweeps.space`)."""

from __future__ import annotations

SPACES: dict[str, tuple[str, ...]] = {
    # The weights λ of the losses, and the temperature of their softmax.
    "weights": ("tcl.loss.image", "tcl.loss.feature", "tcl.loss.area", "tcl.loss.smooth", "tcl.model.temperature"),
    # How much of a picture a text is expected to describe.
    "priors": ("tcl.loss.area", "tcl.loss.positive_prior", "tcl.loss.negative_prior"),
    # Saved masks are scored again, no network is run.
    "inference": ("tcl.refine.pamr_iterations", "tcl.refine.knowledge_weight"),
    # The same for protocols with a background.
    "background": ("tcl.refine.background_threshold", "tcl.refine.pamr_iterations", "tcl.refine.knowledge_weight"),
}
