"""A training step of TCL by part, and the memory of its feature-level loss.

    python benchmarks/tcl_training.py --out

The network has the sizes of the paper (ViT-B/16, two stages of the decoder) and random weights. The parts are timed as
the growing beginning of one step, each beside the whole of it; the differences are what a part takes. Memory is that
of a fresh process that computes masks of all pairs, TCL_f and its gradients from dense embeddings of 56 x 56 cells:
as lexiseg does it, and as the equation reads, with an array of pictures x texts x channels x cells, which only fits
for few pairs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from lexiseg.encoders.clip import build_clip
from lexiseg.environment import keep_memory
from lexiseg.methods.tcl.loss import contrast, feature_level
from lexiseg.methods.tcl.masks import SimToMask, pixel_text_cosines
from lexiseg.methods.tcl.model import TCL
from lexiseg.methods.tcl.module import losses
from lexiseg.methods.tcl.settings import LossSettings

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.harness import arguments_for, compare, peak_memory, table, use_threads, write_result

PAPER = LossSettings(
    image=0.1,
    feature=0.1,
    area=0.4,
    positive_prior=0.4,
    negative_prior=0.0,
    smooth=1.0,
    mask_temperature=1.0,
)
TOLERANCE = 1e-4


# ---- memory --------------------------------------------------------------------------------------------------------


def material(pairs: int, channels: int, side: int) -> tuple[Tensor, Tensor]:
    """Dense embeddings (pairs, channels, side, side) that gradients are asked for, and texts (pairs, channels)."""
    rng = torch.Generator().manual_seed(0)
    embedding = torch.randn(pairs, channels, side, side, generator=rng)
    return embedding.requires_grad_(), torch.randn(pairs, channels, generator=rng)


def ours(embedding: Tensor, text: Tensor) -> Tensor:
    """TCL_f by lexiseg."""
    masks = SimToMask()(pixel_text_cosines(embedding, text)).sigmoid()
    return feature_level(masks, embedding, text, torch.tensor(2.66))


def as_it_reads(embedding: Tensor, text: Tensor) -> Tensor:
    """TCL_f with the masked embeddings of all pairs in memory."""
    unit = F.normalize(embedding, dim=1, eps=1e-6)
    masks = (10 * torch.einsum("bchw,nc->bnhw", unit, F.normalize(text, dim=1, eps=1e-6)) - 2.5).sigmoid()
    masked = masks.unsqueeze(2) * embedding.unsqueeze(1)
    pooled = masked.sum(dim=(3, 4)) / (masks.sum(dim=(2, 3)).unsqueeze(2) + 1e-6)
    similarities = F.cosine_similarity(pooled, text.unsqueeze(0), dim=2, eps=1e-6)
    return contrast(similarities, torch.tensor(2.66))


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"lexiseg": ours, "as it reads": as_it_reads}


def gradient(form: str, pairs: int, channels: int, side: int, threads: int | None) -> float:
    """Loss and gradients once; runs in a process of its own."""
    use_threads(threads)
    embedding, text = material(pairs, channels, side)
    loss = FORMS[form](embedding, text)
    loss.backward()
    return loss.item()


def check(pairs: int, channels: int, side: int) -> None:
    """Stop where the two forms differ."""
    found = {}
    for name, form in FORMS.items():
        embedding, text = material(pairs, channels, side)
        loss = form(embedding, text)
        loss.backward()
        assert embedding.grad is not None
        found[name] = loss.detach(), embedding.grad
    for one, other in zip(found["lexiseg"], found["as it reads"], strict=True):
        if not torch.allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE * float(other.abs().max())):
            raise AssertionError("the two forms of TCL_f differ")


# ---- time ----------------------------------------------------------------------------------------------------------


def parts_of_a_step(model: TCL, images: Tensor, text: Tensor) -> dict[str, Callable[[], Any]]:
    """The whole step first, then its beginnings, in the order in which they grow."""
    cells = model.grid(images)
    noise = torch.rand(len(images), 1, *cells, generator=torch.Generator().manual_seed(0))

    def whole() -> None:
        model.zero_grad()
        sum_of(losses(model, images, text, noise=noise, rank=0, settings=PAPER)).backward()

    def masks() -> Tensor:
        return model.grounder.mask_logits(model.embed(images), text).sigmoid()

    def with_tcl_v() -> Tensor:
        embedding = model.embed(images)
        logits = model.grounder.mask_logits(embedding, text)
        own = torch.arange(len(images))
        return model.embed_masked(images, logits[own, own, None], noise)

    return {
        "whole step": whole,
        "frozen blocks": partial(model.tokens, images),
        "+ last block, decoder, head": partial(model.embed, images),
        "+ masks of all pairs": masks,
        "+ masked pictures through CLIP": with_tcl_v,
        "+ all losses (forward)": lambda: losses(model, images, text, noise=noise, rank=0, settings=PAPER),
    }


def sum_of(found: dict[str, Tensor]) -> Tensor:
    """All losses together."""
    return torch.stack(list(found.values())).sum()


def network(name: str) -> TCL:
    """TCL on a CLIP of random weights."""
    torch.manual_seed(0)
    config = {"kind": "open_clip", "model": open_clip.get_model_config(name)}
    return TCL(build_clip(config, source=name).visual).train()


def main(argv: Sequence[str] | None = None) -> None:
    """Check that both forms agree, measure memory, then time."""
    parser = arguments_for(__doc__, repeats=3)
    parser.add_argument("--model", default="ViT-B-16", help="architecture of open_clip")
    parser.add_argument("--size", type=int, default=224, help="of the pictures in pixels")
    parser.add_argument("--batch", type=int, default=4, help="pairs of the timed step")
    parser.add_argument("--pairs", type=int, default=64, help="pairs whose memory is measured")
    parser.add_argument("--few", type=int, default=8, help="pairs that fit in the other form, too")
    parser.add_argument("--side", type=int, default=56, help="cells of a mask's side")
    given = parser.parse_args(argv)
    use_threads(given.threads)
    keep_memory()
    model = network(given.model)
    channels = model.grounder.proj.shape[1]
    check(4, channels, 8)
    rows: list[dict[str, Any]] = []
    cases = [("lexiseg", given.pairs), ("lexiseg", given.few), ("as it reads", given.few)]
    for form, pairs in cases:
        size = {"channels": channels, "side": given.side, "threads": given.threads}
        memory = peak_memory("tcl_training:gradient", form=form, pairs=pairs, **size)
        rows.append({"what": "memory of TCL_f and its gradients", "form": form, "pairs": pairs, "memory": memory})
        print(f"TCL_f, {form}, {pairs} x {pairs}: {memory['work_bytes'] / 1e9:.2f} GB")
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(given.batch, 3, given.size, given.size, generator=rng)
    text = torch.randn(given.batch, channels, generator=rng)
    timed = compare(parts_of_a_step(model, images, text), repeats=given.repeats, title="parts of a step")
    rows.append({"what": "a training step by part", "model": given.model, "batch": given.batch, **timed})
    print(table(timed, per=given.batch, unit="picture"))
    write_result(f"tcl_training {given.model}", rows, given=given, precision="fp32")


if __name__ == "__main__":
    main()
