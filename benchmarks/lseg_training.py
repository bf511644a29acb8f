"""A training step of LSeg (forward, loss, backward, optimiser) beside the same network computed plainly.

    python benchmarks/lseg_training.py --out
    python benchmarks/lseg_training.py --model ViT-L/16 --batch 8 --precision bf16 --device cuda --out

The peer (plain.py) makes, normalises and correlates every pixel embedding, and so does the authors' code. lexiseg goes
straight from the decoder's features to the cosines where labels are fewer than text dimensions, and keeps weights in
the layout channels-last. A third candidate is the peer in that layout, which shows how much of the gain that is.
All start from the same weights and get the text vectors, which the authors' code computes anew in every step. The
losses of the first steps must agree before anything is timed, the later ones only if the gradients do.

Memory is that of a fresh process, in which one candidate makes two steps: resident on the CPU, allocated on a GPU.
The share of the peak compares the operations of the step with those of large matrix products on the same device.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lexiseg.methods.lseg.loss import pixel_cross_entropy
from lexiseg.methods.lseg.model import LSeg
from lexiseg.segmentation import IGNORE_LABEL

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.harness import arguments_for, compare, peak_memory, table, use_threads, write_result
from benchmarks.networks import picture, random_network
from benchmarks.plain import plain_logits

CANDIDATES = ("lexiseg", "plain", "plain, channels last")
CHECKED_STEPS = 3
TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2}  # of the losses, relative


class Step:
    """One candidate's training.

    Args:
        name: one of CANDIDATES.
        model: the network; it is trained.
        data: images (B, 3, H, W), target (B, H, W), text (N, C).
        precision: fp32, or bf16 for autocast with float32 weights.
    """

    def __init__(self, name: str, model: LSeg, data: tuple[Tensor, Tensor, Tensor], *, precision: str) -> None:
        self.name, self.model, self.precision = name, model.train(), precision
        self.images, self.target, self.text = data
        if name != "plain":
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimiser = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)

    def __call__(self) -> Tensor:
        """Make one step; the loss before it."""
        device = self.images.device.type
        with torch.autocast(device, torch.bfloat16) if self.precision == "bf16" else nullcontext():
            loss = self.loss()
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        return loss.detach()

    def loss(self) -> Tensor:
        if self.name == "lexiseg":
            return pixel_cross_entropy(self.model(self.images, self.text), self.target)
        size = (self.images.shape[-2], self.images.shape[-1])
        logits = plain_logits(self.model, self.images, self.text, size=size)
        return F.cross_entropy(logits, self.target, ignore_index=IGNORE_LABEL)


def data_for(given: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures, targets in squares of 32 pixels with a tenth to be ignored, and random text vectors."""
    rng = np.random.default_rng(0)
    height, width = given.size
    pictures = [picture(height=height, width=width, seed=seed) for seed in range(given.batch)]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    squares = rng.integers(0, given.labels, (given.batch, -(-height // 32), -(-width // 32)))
    target = squares.repeat(32, axis=1).repeat(32, axis=2)[:, :height, :width]
    target = np.where(rng.random(target.shape) < 0.1, IGNORE_LABEL, target)
    text = F.normalize(torch.from_numpy(rng.normal(size=(given.labels, given.text_dim)).astype(np.float32)), dim=-1)
    device = given.device
    return images.to(device), torch.from_numpy(target).to(device), text.to(device)


def network(given: argparse.Namespace) -> LSeg:
    """The network that all candidates start from."""
    with tempfile.TemporaryDirectory() as folder:
        model, _ = random_network(Path(folder), text_dim=given.text_dim, backbone=given.model, features=given.features)
    return model.to(given.device)


def memory_of(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Two steps of one candidate; runs in a process of its own."""
    given = argparse.Namespace(**options)
    use_threads(given.threads)
    step = Step(name, network(given), data_for(given), precision=given.precision)
    for _ in range(2):  # the optimiser's own memory comes with the first
        step()
    return {"cuda_bytes": torch.cuda.max_memory_allocated() if given.device == "cuda" else None}


def check_losses(steps: dict[str, Step], *, tolerance: float) -> dict[str, list[float]]:
    """The losses of the first steps, which must agree."""
    losses = {name: [float(step()) for _ in range(CHECKED_STEPS)] for name, step in steps.items()}
    for found in losses.values():
        if not np.allclose(found, losses["lexiseg"], rtol=tolerance):
            raise AssertionError(f"the losses differ: {losses}")
    return losses


def operations(step: Callable[[], Any]) -> int:
    """Floating-point operations of one step: matrix products, convolutions and attention."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


# Sides of the matrices whose products are timed, large enough to keep a device busy.
PEAK_SIDES = {"cuda": 8192, "cpu": 2048}


def matrix_peak(*, device: str, precision: str) -> float:
    """Operations per second of large square matrix products, the best of five."""
    side = PEAK_SIDES[device]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    timed = compare({"product": lambda: one @ other}, repeats=5, device=device, title="matrix products")
    return 2 * side**3 / min(timed["seconds"]["product"]["all"])


def main(argv: Sequence[str] | None = None) -> None:
    """Check that the losses agree, then time, then measure memory."""
    parser = arguments_for(__doc__, repeats=5)
    parser.add_argument("--model", default="ViT-B/16", help="backbone: ViT-B/16, ViT-L/16, or another of timm")
    parser.add_argument("--features", type=int, default=256, help="width of the decoder")
    parser.add_argument("--text-dim", type=int, default=512)
    parser.add_argument("--labels", type=int, default=150)
    parser.add_argument("--size", type=int, nargs=2, default=[480, 480], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precision", default="fp32", choices=list(TOLERANCES))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    given = parser.parse_args(argv)
    use_threads(given.threads)
    first, data = network(given), data_for(given)
    steps = {name: Step(name, copy.deepcopy(first), data, precision=given.precision) for name in CANDIDATES}
    losses = check_losses(steps, tolerance=TOLERANCES[given.precision])
    timed = compare(steps, repeats=given.repeats, device=given.device, title="training steps")
    peak = matrix_peak(device=given.device, precision=given.precision)
    row: dict[str, Any] = {"losses": losses, **timed, "matrix_peak": peak, "candidates": {}}
    print(table(timed, unit="step"))
    options = {key: value for key, value in vars(given).items() if key != "out"}
    for name, step in steps.items():
        seconds, count = timed["seconds"][name]["median"], operations(step)
        memory = peak_memory("lseg_training:memory_of", name=name, options=options)
        row["candidates"][name] = {
            "images_per_second": given.batch / seconds,
            "operations": count,
            "share_of_peak": count / seconds / peak,
            "memory": memory,
        }
        took = memory["result"]["cuda_bytes"] or memory["peak_bytes"]
        print(
            f"  {name:<34} {given.batch / seconds:.2f} images/s, {count / 1e12:.2f} TFLOP, "
            f"{count / seconds / peak:.0%} of the peak of matrix products, {took / 1e9:.2f} GB"
        )
    name = f"lseg_training-{given.model}"
    write_result(name, [row], given=given, precision=given.precision, device=given.device)


if __name__ == "__main__":
    main()
