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
from lexiseg.tracking.settings import PromotionSettings


class CommonSettings(Block):
    """The top level of params.yaml without the methods."""

    profile: str
    seed: int = Field(ge=0, lt=2**31)
    threads: int = Field(ge=1, le=1024)
    devices: int = Field(ge=1, le=1024)
    data: DataSettings
    encode: EncodeSettings
    evaluate: EvaluateSettings
    baselines: tuple[str, ...]
    baseline: BaselineSettings
    promotion: PromotionSettings

    @model_validator(mode="after")
    def _fits_together(self) -> CommonSettings:
        encode, faults = self.encode, []
        if encode.clip.source == "none" and "clip" in (encode.text.source, encode.backbone.source):
            faults.append("encode.clip.source is none, but text or backbone has the source clip")
        lseg, tcl, stego = (getattr(self, name, None) for name in ("lseg", "tcl", "stego"))
        if not self.baselines and not (stego and stego.baselines):
            # The stage report depends on outputs/baselines, which DVC expects to be there.
            faults.append("baselines and stego.baselines are both empty: name at least one baseline in one of them")
        for name, method in (("lseg", lseg), ("tcl", tcl)):
            if method and method.run and method.train.batch % self.devices:
                faults.append(
                    f"{name}.train.batch {method.train.batch} cannot be divided among devices: {self.devices}"
                )
        model = lseg.model if lseg and lseg.run else None
        if model and encode.text.source == "none":
            faults.append("lseg needs vectors of the labels: set encode.text.source, or lseg.run: false")
        if encode.backbone.source == "none":
            if model and not model.folder:
                faults.append("lseg needs a backbone: set encode.backbone.source, or lseg.run: false")
            if "linear" in self.baselines:
                faults.append("the baseline linear needs a backbone: set encode.backbone.source")
        if "maskclip" in self.baselines and encode.text.source != "clip":
            faults.append("the baseline maskclip needs encode.text.source: clip")
        if "linear" in self.baselines and self.evaluate.episodes:
            faults.append(
                "the baseline linear knows the classes it was fitted on and no `others`: leave it out of `baselines`, "
                "or set evaluate.episodes to null"
            )
        if model and model.clip_residual and not model.folder and encode.backbone.source != "clip":
            faults.append("lseg.model.clip_residual needs encode.backbone.source: clip")
        if tcl and tcl.run and encode.text.source != "clip":
            faults.append("tcl needs encode.text.source: clip, with a ViT in encode.clip; or set tcl.run: false")
        try:
            card = load_protocol(self.evaluate.protocol)
            card.check(dataset=self.data.name, adapter=self.data.adapter, episodes=self.evaluate.episodes)
            card.check_clusters(clusters=False)
            if tcl and tcl.run and tcl.refine.background_threshold and card.background.policy == "none":
                faults.append(f"tcl.refine.background_threshold: the protocol {card.name} has no background; set null")
        except ProtocolError as error:
            faults.append(f"evaluate.protocol: {error.found}; allowed: {error.allowed}; to do: {error.fix}")
        if stego and stego.run:
            faults += self._stego_faults(stego)
        for key in ("floors", "class_floors"):
            if unknown := sorted(set(getattr(self.promotion, key)) - set(METHODS)):
                faults.append(f"promotion.{key} of {', '.join(unknown)}: methods are {', '.join(METHODS)}")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _stego_faults(self, stego: Any) -> list[str]:
        faults = []
        if self.encode.trunk.source == "none":
            faults.append("stego needs a trunk: set encode.trunk.source, or stego.run: false")
        try:
            card = load_protocol(stego.protocol)
            card.check(dataset=self.data.name, adapter=self.data.adapter, episodes=None)
            card.check_clusters(clusters=True)
        except ProtocolError as error:
            faults.append(f"stego.protocol: {error.found}; allowed: {error.allowed}; to do: {error.fix}")
        return faults


def _different(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) != len(names):
        raise ValueError("names, each once")
    return names


@cache
def root_block() -> type[CommonSettings]:
    """The type of params.yaml: the common blocks and one block per method of the registry."""
    fields: dict[str, Any] = {
        name: (resolve(method.settings), ...) for name, method in METHODS.items() if method.settings
    }
    names = tuple[Literal[tuple(BASELINES)], ...]  # type: ignore[misc]
    fields["baselines"] = (Annotated[names, AfterValidator(_different)], ...)
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
