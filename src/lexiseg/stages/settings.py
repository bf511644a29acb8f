"""params.yaml as a whole: the root block, put together from the blocks of the data, the encoders and the methods."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, create_model, model_validator

from lexiseg.data.settings import DataSettings
from lexiseg.encoders.settings import EncodeSettings
from lexiseg.evaluation.protocol import ProtocolError, load_protocol
from lexiseg.evaluation.settings import EvaluateSettings
from lexiseg.methods import BASELINES, METHODS, resolve
from lexiseg.methods.baselines.settings import BaselineSettings
from lexiseg.settings import Block, parse, read_yaml


class CommonSettings(Block):
    """The top level of params.yaml without the methods."""

    profile: str
    seed: int = Field(ge=0, lt=2**31)
    threads: int = Field(ge=1, le=1024)
    data: DataSettings
    encode: EncodeSettings
    evaluate: EvaluateSettings
    baselines: tuple[str, ...]
    baseline: BaselineSettings

    @model_validator(mode="after")
    def _fits_together(self) -> CommonSettings:
        encode, faults = self.encode, []
        if encode.clip.source == "none" and "clip" in (encode.text.source, encode.backbone.source):
            faults.append("encode.clip.source is none, but text or backbone has the source clip")
        if "maskclip" in self.baselines and encode.text.source != "clip":
            faults.append("the baseline maskclip needs encode.text.source: clip")
        if "linear" in self.baselines and self.evaluate.episodes:
            faults.append(
                "the baseline linear knows the classes it was fitted on and no `others`: leave it out of `baselines`, "
                "or set evaluate.episodes to null"
            )
        lseg, tcl = getattr(self, "lseg", None), getattr(self, "tcl", None)
        model = lseg.model if lseg and lseg.run else None
        if model and model.clip_residual and not model.folder and encode.backbone.source != "clip":
            faults.append("lseg.model.clip_residual needs encode.backbone.source: clip")
        if tcl and tcl.run and encode.text.source != "clip":
            faults.append("tcl needs encode.text.source: clip, with a ViT in encode.clip; or set tcl.run: false")
        try:
            card = load_protocol(self.evaluate.protocol)
            card.check(dataset=self.data.name, adapter=self.data.adapter, episodes=self.evaluate.episodes)
            if tcl and tcl.run and tcl.refine.background_threshold and card.background.policy == "none":
                faults.append(f"tcl.refine.background_threshold: the protocol {card.name} has no background; set null")
        except ProtocolError as error:
            faults.append(f"evaluate.protocol: {error.found}; allowed: {error.allowed}; to do: {error.fix}")
        if faults:
            raise ValueError("; ".join(faults))
        return self


def _some_and_different(names: tuple[str, ...]) -> tuple[str, ...]:
    if not names or len(set(names)) != len(names):
        raise ValueError("one or more names, each once")
    return names


@cache
def root_block() -> type[CommonSettings]:
    """The type of params.yaml: the common blocks and one block per method of the registry."""
    fields: dict[str, Any] = {
        name: (resolve(method.settings), ...) for name, method in METHODS.items() if method.settings
    }
    names = tuple[Literal[tuple(BASELINES)], ...]  # type: ignore[misc]
    fields["baselines"] = (Annotated[names, AfterValidator(_some_and_different)], ...)
    return create_model("Root", __base__=CommonSettings, **fields)


def parse_settings(values: Mapping[str, Any], *, source: str = "params.yaml") -> Any:
    """Typed settings of plain values.

    Raises:
        SettingsError: all unknown keys and wrong values at once.
    """
    return parse(values, root_block(), source=source)


def read_values(root: Path) -> dict[str, Any]:
    """The plain values of params.yaml."""
    return read_yaml(root / "params.yaml") or {}
