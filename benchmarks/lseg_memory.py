"""Memory of LSeg with ten thousand labels: the most that `lexiseg.load(folder).segment` has resident.

    python benchmarks/lseg_memory.py --out

Each case is a process of its own, with and without the spatial regularisation block (bottleneck, depth 2). What the
process holds is imports, the text tower of the CLIP, the network, and the work. Encoding ten thousand labels takes
minutes on a CPU; it is done once and kept, as in any working tree.

The peer (plain.py) has the same CLIP and network; its text vectors are random and given to it. It holds the logits of
all labels at the size of the picture. Where they would not fit into the free memory it is not run, and the row has what
its two largest arrays alone take, marked as computed.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import psutil
import torch
import torch.nn.functional as F

import lexiseg

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.harness import arguments_for, peak_bytes, peak_memory, use_threads, write_result
from benchmarks.networks import CLIP, Block, labels, picture, working_tree, write_model
from benchmarks.plain import PlainSegmenter

LIMIT = 4_000_000_000  # bytes that lexiseg is to stay below with 10,000 labels


def by_lexiseg(folder: str, count: int, height: int, width: int, threads: int | None) -> dict[str, Any]:
    """Segment one picture through the public API; runs in a process of its own."""
    use_threads(threads)
    model = lexiseg.load(folder)
    loaded = peak_bytes()
    result = model.segment(picture(height=height, width=width), labels(count))
    return {"loaded_bytes": loaded, "labels_found": len(np.unique(result.label_map))}


def by_peer(folder: str, count: int, height: int, width: int, threads: int | None) -> dict[str, Any]:
    """Segment one picture plainly; runs in a process of its own."""
    use_threads(threads)
    peer = PlainSegmenter(Path(folder))
    loaded = peak_bytes()
    text = F.normalize(torch.randn(count, peer.clip.dim), dim=-1)
    label_map = peer.segment(picture(height=height, width=width), text)
    return {"loaded_bytes": loaded, "labels_found": len(np.unique(label_map))}


def peer_arrays(count: int, height: int, width: int) -> int:
    """Bytes of float32 logits at half and at full size."""
    return 4 * count * (-(-height // 2) * -(-width // 2) + height * width)


def of_peer(case: dict[str, Any], *, block: str, measure: str) -> dict[str, Any]:
    """The peer's memory, measured where it fits."""
    arrays = peer_arrays(case["count"], case["height"], case["width"])
    # For convolutions of one channel oneDNN fills up a copy to sixteen channels.
    fits = psutil.virtual_memory().available > arrays * (2 if block == "none" else 5)
    if measure == "never" or (measure == "auto" and not fits):
        return {"how": "computed", "peak_bytes": arrays}
    return {"how": "measured", **peak_memory("lseg_memory:by_peer", **case)}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every case."""
    parser = arguments_for(__doc__, repeats=None)
    parser.add_argument("--model", default="ViT-B/16", help="backbone: ViT-B/16, ViT-L/16, or a ViT of timm")
    parser.add_argument("--clip", default=CLIP, help="architecture of open_clip, for the labels")
    parser.add_argument("--features", type=int, default=256, help="width of the decoder")
    parser.add_argument("--labels", type=int, default=10_000)
    parser.add_argument("--size", type=int, nargs=2, default=[360, 480], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--blocks", nargs="+", default=["none", "bottleneck"], choices=get_args(Block))
    parser.add_argument("--peer", default="auto", choices=["auto", "always", "never"], help="whether the peer is run")
    given = parser.parse_args(argv)
    use_threads(given.threads)
    rows = []
    height, width = given.size
    with working_tree() as tree:  # one for all: the text vectors are kept in it
        for block in given.blocks:
            folder = write_model(
                tree / block, clip=given.clip, backbone=given.model, features=given.features, block=block
            )
            case = {"folder": str(folder), "count": given.labels, "height": height, "width": width}
            case["threads"] = torch.get_num_threads()
            print(f"block {block}: a picture with {given.labels} labels", file=sys.stderr)
            ours = peak_memory("lseg_memory:by_lexiseg", **case)
            peer = of_peer(case, block=block, measure=given.peer)
            shutil.rmtree(folder)
            rows.append({"labels": given.labels, "block": block, "lexiseg": ours, "peer": peer, "limit_bytes": LIMIT})
            print(
                f"{given.labels} labels, block {block}\n"
                f"  lexiseg {ours['peak_bytes'] / 1e9:.2f} GB ({ours['imports_bytes'] / 1e9:.2f} GB imports, "
                f"{ours['result']['loaded_bytes'] / 1e9:.2f} GB when loaded); limit {LIMIT / 1e9:.0f} GB: "
                f"{'kept' if ours['peak_bytes'] <= LIMIT else 'EXCEEDED'}\n"
                f"  plain   {peer['peak_bytes'] / 1e9:.2f} GB ({peer['how']})"
            )
    write_result(f"lseg_memory-{given.model}", rows, given=given, precision="fp32")
    if any(row["lexiseg"]["peak_bytes"] > LIMIT for row in rows):
        sys.exit("over the limit")


if __name__ == "__main__":
    main()
