"""Refinement of cluster scores by the dense CRF, without the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from lexiseg.device import best_device
from lexiseg.errors import SettingsError
from lexiseg.layers.crf import CrfSettings, HeavyKernelError, NarrowKernelError, dense_crf
from lexiseg.methods.stego.settings import RefineSettings
from lexiseg.settings import parse


def refiner(values: Mapping[str, Any]) -> Callable[[np.ndarray, np.ndarray], np.ndarray] | None:
    """`stego.refine` -> (logits (N, h, w), uint8 RGB picture (H, W, 3)) -> logarithms of shares (N, H, W).

    None where no iteration is asked for. The logits are brought to the picture's size first.

    Raises:
        SettingsError: wrong values; or, at a picture, kernels too narrow or too heavy to be computed for it.
    """
    settings = parse(dict(values), RefineSettings, source="stego.refine")
    return _Crf(settings) if settings.crf_iterations else None


class _Crf:
    def __init__(self, settings: RefineSettings) -> None:
        self._asked, values = settings, settings.model_dump()
        self._settings = CrfSettings(iterations=values.pop("crf_iterations"), **values)
        self._device = best_device()

    def __call__(self, logits: np.ndarray, image: np.ndarray) -> np.ndarray:
        scores = torch.from_numpy(np.ascontiguousarray(logits)).to(self._device)[None]
        if scores.shape[-2:] != image.shape[:2]:
            scores = F.interpolate(scores, size=image.shape[:2], mode="bilinear", align_corners=False)
        picture = torch.from_numpy(np.array(image)).to(self._device).permute(2, 0, 1)[None]
        try:
            shares = dense_crf(picture, scores.softmax(dim=1), self._settings)[0]
        except NarrowKernelError as error:
            keys = ("bilateral_width", "bilateral_colour")
            raise self._refused(image, keys, fault="too narrow", allowed="wider kernels") from error
        except HeavyKernelError as error:
            keys = ("gaussian_weight", "bilateral_weight")
            raise self._refused(image, keys, fault="too large", allowed="smaller weights") from error
        # As logits again: the softmax of them is the shares.
        return shares.clamp(min=1e-12).log().cpu().numpy()

    def _refused(self, image: np.ndarray, keys: Sequence[str], *, fault: str, allowed: str) -> SettingsError:
        height, width = image.shape[:2]
        found = " and ".join(f"`stego.refine.{key}: {getattr(self._asked, key)}`" for key in keys)
        usual = ", ".join(f"`{key}: {RefineSettings.model_fields[key].default}`" for key in keys)
        return SettingsError(
            found=f"{found}, {fault} for a picture of {height} x {width} pixels",
            allowed=f"{allowed}; the authors' are {usual}",
            fix="set one or both anew, or `stego.refine.crf_iterations: 0` for no CRF",
        )
