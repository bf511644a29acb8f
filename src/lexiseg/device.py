"""Where trained models compute."""

from __future__ import annotations

import torch


def best_device() -> torch.device:
    """The first GPU that torch sees, else the CPU. `CUDA_VISIBLE_DEVICES=` hides the GPUs."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
