"""LSeg's training loss: per-pixel softmax cross entropy over the labels of the training set."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lexiseg.segmentation import IGNORE_LABEL


def pixel_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross entropy over labelled pixels (paper section 3.2).

    Args:
        logits: (B, N, H, W), already divided by the temperature.
        target: int64 (B, H, W), label indices 0..N-1; -100 is left out.

    Returns:
        A scalar; zero (with a gradient of zero) where no pixel is labelled.
    """
    if not bool((target != IGNORE_LABEL).any()):
        return logits.sum() * 0.0
    return F.cross_entropy(logits.float(), target, ignore_index=IGNORE_LABEL)
