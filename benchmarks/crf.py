"""Dense CRF: lexiseg beside pydensecrf2, the compiled library that STEGO's authors use.

    pip install --no-deps --target /tmp/pydensecrf pydensecrf2     (it is compiled; lexiseg itself does not need it)
    export PYTHONPATH=/tmp/pydensecrf
    python benchmarks/crf.py --threads 1 --pictures PICTURES --out
    python benchmarks/crf.py --threads 1 --accuracy --pictures PICTURES --out
    python benchmarks/crf.py --threads 1 --device cuda --pictures PICTURES --out

Both refine the same shares of labels on the same pictures, scaled to a square: cosines of smoothed colours with random
centres, which divide a picture about as clusters of codes do. Both are approximate; the share of pixels with equal
labels is printed, and below 99 % nothing is timed. With --pictures they are photographs, without it drawn soft shapes.

How near both come to exact inference (plain.py: whole kernel matrices) is seen on the same pictures at 40 x 40 pixels
with 5 labels; below 90 % of equal labels nothing is timed either. --accuracy sees to this alone.

With --device cuda lexiseg refines on the GPU, the way there and back included; pydensecrf2 has the CPU alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lexiseg.environment import keep_memory
from lexiseg.layers.crf import SMALLEST_SHARE, CrfSettings, dense_crf

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.harness import arguments_for, compare, table, use_threads, write_result
from benchmarks.plain import plain_crf

AGREEMENT = 0.99
NEAR_EXACT = 0.9
SMALL = {"side": 40, "labels": 5}  # where whole kernel matrices fit: 20 MB each


def picture(path: Path | None, side: int, *, seed: int) -> np.ndarray:
    """uint8 RGB (side, side, 3) of a file, or of soft shapes."""
    if path is not None:
        return np.array(Image.open(path).convert("RGB").resize((side, side)))
    rng = torch.Generator().manual_seed(seed)
    coarse = F.interpolate(torch.rand(1, 3, 7, 7, generator=rng), size=(side, side), mode="bicubic")
    steps = (coarse * 6).round() / 6 * 255 + 4 * torch.randn(1, 3, side, side, generator=rng)
    return steps[0].clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()


def shares_of(image: np.ndarray, labels: int, *, seed: int) -> Tensor:
    """(1, labels, H, W), sum 1: twice the cosines of smoothed colours with centres found in them, through a softmax."""
    rng = torch.Generator().manual_seed(seed)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1
    cells = F.interpolate(pixels, scale_factor=1 / 8, mode="area")
    codes = torch.cat(
        [cells, F.avg_pool2d(cells, 5, 1, 2), 0.3 * torch.randn(1, 8, *cells.shape[2:], generator=rng)], 1
    )
    rows = F.normalize(codes, dim=1).flatten(2)[0].T
    centres = rows[torch.randperm(len(rows), generator=rng)[:labels]]
    finer = F.interpolate(F.normalize(codes, dim=1), size=pixels.shape[-2:], mode="bilinear")
    return (2 * torch.einsum("bkhw,nk->bnhw", F.normalize(finer, dim=1), centres)).softmax(dim=1)


def ours(image: np.ndarray, shares: Tensor, iterations: int, *, device: str = "cpu") -> np.ndarray:
    """Shares (labels, H, W) by lexiseg."""
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].to(device)
    return dense_crf(pixels, shares.to(device), CrfSettings(iterations=iterations))[0].cpu().numpy()


def pydensecrf(image: np.ndarray, shares: Tensor, iterations: int) -> np.ndarray:
    """The same by pydensecrf2."""
    from pydensecrf.densecrf import DenseCRF2D  # type: ignore[import-not-found]

    labels, height, width = shares.shape[1:]
    settings = CrfSettings()
    field = DenseCRF2D(width, height, labels)
    unary = -shares[0].clamp(min=SMALLEST_SHARE).log().reshape(labels, -1)
    field.setUnaryEnergy(np.ascontiguousarray(unary.numpy()))
    field.addPairwiseGaussian(sxy=settings.gaussian_width, compat=settings.gaussian_weight)
    field.addPairwiseBilateral(
        sxy=settings.bilateral_width,
        srgb=settings.bilateral_colour,
        rgbim=np.ascontiguousarray(image),
        compat=settings.bilateral_weight,
    )
    return np.array(field.inference(iterations)).reshape(labels, height, width)


def candidates(device: str = "cpu") -> dict[str, Callable[[np.ndarray, Tensor, int], np.ndarray]]:
    """What is compared, by name."""
    return {"lexiseg": partial(ours, device=device), "pydensecrf2": pydensecrf}


def from_exact(path: Path | None, iterations: int, *, seed: int) -> dict[str, Any]:
    """How far each candidate is from the exact inference on a picture made small.

    Returns:
        `side`, `labels`, and per candidate `equal_labels` (share of the pixels), `mean_difference` and
        `largest_difference` (of shares, 0..1).

    Raises:
        AssertionError: lexiseg has other labels at more than a tenth of the pixels.
    """
    image = picture(path, SMALL["side"], seed=seed)
    shares = shares_of(image, SMALL["labels"], seed=seed)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    exact = plain_crf(pixels, shares, CrfSettings(iterations=iterations))[0].numpy()
    found: dict[str, Any] = {**SMALL}
    for name, refine in candidates().items():
        refined = refine(image, shares, iterations)
        apart = np.abs(refined - exact)
        found[name] = {
            "equal_labels": float((refined.argmax(axis=0) == exact.argmax(axis=0)).mean()),
            "mean_difference": float(apart.mean()),
            "largest_difference": float(apart.max()),
        }
    if (equal := found["lexiseg"]["equal_labels"]) < NEAR_EXACT:
        raise AssertionError(f"only {100 * equal:.2f} % of the pixels have the labels of exact inference")
    return found


def told(found: Mapping[str, Any]) -> str:
    """What `from_exact` gave as lines to print."""
    lines = [f"  beside exact inference, {found['labels']} labels on {found['side']} x {found['side']}:"]
    for name in candidates():
        equal, mean, largest = (found[name][key] for key in ("equal_labels", "mean_difference", "largest_difference"))
        apart = f"shares differ by {mean:.4f}, by {largest:.4f} at most"
        lines.append(f"  {name:<34} equal labels {100 * equal:.2f} %, {apart}")
    return "\n".join(lines)


def timed(path: Path | None, given: argparse.Namespace, *, seed: int, title: str) -> dict[str, Any]:
    """Times of a picture at full size, and `equal_labels` and `changed_labels`, shares of its pixels.

    Raises:
        AssertionError: too few labels are equal; nothing was timed.
    """
    image = picture(path, given.side, seed=seed)
    shares = shares_of(image, given.labels, seed=seed)
    ways = candidates(given.device)
    runs = {name: partial(refine, image, shares, given.iterations) for name, refine in ways.items()}
    one, other = (run().argmax(axis=0) for run in runs.values())
    agreement = float((one == other).mean())
    changed = float((shares[0].argmax(dim=0).numpy() != other).mean())
    if agreement < AGREEMENT:
        raise AssertionError(f"{title}: only {100 * agreement:.2f} % of the pixels have equal labels")
    times = compare(runs, repeats=given.repeats, device=given.device, title=title)
    print(f"  equal labels {100 * agreement:.2f} %, changed by the CRF {100 * changed:.1f} %")
    print(table(times, unit="picture"))
    return {"equal_labels": agreement, "changed_labels": changed, **times}


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> None:
    """Compare with exact inference, check that labels agree, then time."""
    parser = arguments_for(__doc__, repeats=7)
    parser.add_argument("--pictures", type=Path, nargs="+", help="photographs; default: three drawn ones")
    parser.add_argument("--side", type=int, default=320)
    parser.add_argument("--labels", type=int, default=27)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--device", default="cpu", help="cpu or cuda, of lexiseg")
    parser.add_argument("--accuracy", action="store_true", help="compare with exact inference alone; nothing is timed")
    given = parser.parse_args(argv)
    use_threads(given.threads)
    keep_memory()
    rows = []
    for number, path in enumerate(given.pictures or [None] * 3):
        name = path.name if path else f"drawn {number}"
        row = {"picture": name, "from_exact": from_exact(path, given.iterations, seed=number)}
        print(f"{name}\n{told(row['from_exact'])}")
        if not given.accuracy:
            row |= timed(path, given, seed=number, title=name)
        rows.append(row)
    given.pictures = [path.name for path in given.pictures] if given.pictures else None
    for option in ("repeats", "side", "labels") if given.accuracy else ():
        delattr(given, option)  # it had no part in this
    name = "crf accuracy" if given.accuracy else "crf"
    device = vars(given).pop("device")
    write_result(name, rows, given=given, precision="fp32", device=device, peers=("pydensecrf2",))


if __name__ == "__main__":
    main()
