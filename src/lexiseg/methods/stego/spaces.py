"""What `lexiseg sweep stego` searches: spaces by name, each a list of knobs (see `lexiseg.sweeps.space`)."""

from __future__ import annotations

SPACES: dict[str, tuple[str, ...]] = {
    # The shifts b, which the rules of `stego.loss.shifts` choose without labels.
    "shifts": (
        "stego.loss.shifts=fixed",
        "stego.loss.self_shift",
        "stego.loss.knn_shift",
        "stego.loss.random_shift",
    ),
    # The weights λ of the three kinds of pairs.
    "weights": ("stego.loss.self", "stego.loss.knn", "stego.loss.random"),
    # Saved scores are refined again, no network is run.
    "inference": (
        "stego.refine.crf_iterations",
        "stego.refine.bilateral_width",
        "stego.refine.bilateral_colour",
        "stego.refine.bilateral_weight",
    ),
}
