"""LSeg inference: `lexiseg.load(folder).segment` beside the same network computed plainly.

    python benchmarks/lseg_inference.py --out

The peer (plain.py) sends the labels through CLIP's text tower on every call, brings all logits to the size of the
picture, and takes the best label from them. Another peer is given the text vectors: what lies between the two peers is
what keeping text vectors saves, what lies between it and lexiseg is the rest. Everything is float32 and has the same
random weights; that the label maps agree is checked before anything is timed.

lexiseg takes a GPU where there is one; CUDA_VISIBLE_DEVICES= hides it for a run with --device cpu.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lexiseg

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.harness import arguments_for, compare, table, use_threads, write_result
from benchmarks.networks import CLIP, labels, picture, working_tree, write_model
from benchmarks.plain import PlainSegmenter

AGREEMENT = 0.999  # share of pixels that must get the same label; rounding decides between labels that are equal
PLAIN, GIVEN = "plain, labels encoded each time", "plain, text vectors given"


def shares(timed: dict[str, Any]) -> dict[str, float]:
    """Seconds that lexiseg saves on a call, and the share of them that comes from keeping text vectors."""
    ours, plain, given = (timed["seconds"][name]["median"] for name in ("lexiseg", PLAIN, GIVEN))
    return {
        "saved_seconds": plain - ours,
        "by_text_vectors": (plain - given) / (plain - ours),
        "by_the_rest": (given - ours) / (plain - ours),
    }


def of_lexiseg(folder: Path, names: list[str]) -> Callable[[np.ndarray], np.ndarray]:
    """Picture (H, W, 3) -> label map (H, W) by lexiseg."""
    model = lexiseg.load(folder)
    return lambda image: model.segment(image, names).label_map


def main(argv: Sequence[str] | None = None) -> None:
    """Check that the label maps agree, then time."""
    parser = arguments_for(__doc__, repeats=5)
    parser.add_argument("--model", default="ViT-B/16", help="backbone: ViT-B/16, ViT-L/16, or a ViT of timm")
    parser.add_argument("--clip", default=CLIP, help="architecture of open_clip, for the labels")
    parser.add_argument("--features", type=int, default=256, help="width of the decoder")
    parser.add_argument("--labels", type=int, nargs="+", default=[20, 150, 1000])
    parser.add_argument("--size", type=int, nargs=2, default=[480, 480], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    given = parser.parse_args(argv)
    use_threads(given.threads)
    if (given.device == "cuda") != torch.cuda.is_available():
        sys.exit("lexiseg takes a GPU where there is one: --device cuda there, else hide it by CUDA_VISIBLE_DEVICES=")
    rows = []
    height, width = given.size
    image = picture(height=height, width=width)
    with working_tree() as tree:
        folder = write_model(tree / "model", clip=given.clip, backbone=given.model, features=given.features)
        peer = PlainSegmenter(folder, device=given.device)
        for count in given.labels:
            print(f"{count} labels: comparing the label maps, then the times", file=sys.stderr)
            names = labels(count)
            ours = of_lexiseg(folder, names)
            vectors = peer.encode(names)
            candidates = {
                "lexiseg": lambda ours=ours: ours(image),
                PLAIN: lambda names=names: peer.segment(image, peer.encode(names)),
                GIVEN: lambda vectors=vectors: peer.segment(image, vectors),
            }
            maps = {name: candidate() for name, candidate in candidates.items()}
            agreement = min(float((found == maps["lexiseg"]).mean()) for found in maps.values())
            if agreement < AGREEMENT:
                raise AssertionError(f"{count} labels: only {agreement:.2%} of the pixels have the same label")
            timed = compare(candidates, repeats=given.repeats, device=given.device, title=f"{count} labels")
            found = {"labels": count, "labels_found": len(np.unique(maps["lexiseg"])), "equal_pixels": agreement}
            rows.append({**found, **shares(timed), **timed})
            print(f"{count} labels, {100 * agreement:.3f} % of the pixels equal\n{table(timed, unit='picture')}")
            print(f"  of the time saved, {rows[-1]['by_text_vectors']:.0%} by keeping text vectors")
    write_result(f"lseg_inference-{given.model}", rows, given=given, precision="fp32", device=given.device)


if __name__ == "__main__":
    main()
