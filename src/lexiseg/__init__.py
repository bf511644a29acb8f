"""lexiseg: language-driven and unsupervised segmentation as one versioned, tracked stage graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lexiseg import environment  # before any library that would report home

if TYPE_CHECKING:
    from lexiseg.inference import Model
    from lexiseg.loading import load

__version__ = "0.1.0"
__all__ = ["Model", "__version__", "environment", "load"]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import: `import lexiseg` and the command line must not wait for it.
    if name == "Model":
        from lexiseg.inference import Model

        return Model
    if name == "load":
        from lexiseg.loading import load

        return load
    raise AttributeError(f"module 'lexiseg' has no attribute '{name}'")
