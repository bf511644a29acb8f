"""Pictures for people: label maps over photographs, legends, sheets. Arrays are H x W x 3 uint8 RGB throughout."""

from lexiseg.pictures.layout import legend, side_by_side, stack, write_png
from lexiseg.pictures.masks import MOST_PANELS, mask_sheet
from lexiseg.pictures.overlay import enlarged, overlay
from lexiseg.pictures.palette import palette

__all__ = [
    "MOST_PANELS",
    "enlarged",
    "legend",
    "mask_sheet",
    "overlay",
    "palette",
    "side_by_side",
    "stack",
    "write_png",
]
