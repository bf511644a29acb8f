"""prepare: raw files of any adapter become one data set on disk, a manifest of facts, and the vocabulary.

    dataset/<split>/    rows of the readable samples (`lexiseg.data.features`)
    manifest.parquet    facts about every raw sample (`lexiseg.data.manifest`)
    vocabulary.json     class names
    episodes.json       of data sets that come with episodes (`lexiseg.data.episodes`)
    info.json           name, adapter, licence, counts, digest of the content

A sample that cannot be read is in the manifest only, with the reason; validate judges.
"""

from __future__ import annotations

import difflib
import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lexiseg.data.adapters import open_adapter
from lexiseg.data.adapters.base import Adapter, ListsEpisodes, RawSample
from lexiseg.data.episodes import write_episodes
from lexiseg.data.features import SplitWriter
from lexiseg.data.manifest import write_manifest
from lexiseg.data.pool import Pool, Source
from lexiseg.data.rows import Examined
from lexiseg.errors import DataError
from lexiseg.storage import write_json
from lexiseg.vocabulary import Vocabulary


def run(settings: Any, inputs: Mapping[str, Path], outputs: Path) -> None:
    """Prepare the data set `settings.data` names.

    Args:
        settings: the root settings; `data` is read (`lexiseg.data.settings.DataSettings`).
        inputs: "data": folder of the raw files.
        outputs: folder to write into.

    Raises:
        DataError: no such folder or adapter, a list of the data set (classes, splits) is at fault, or
            `data.unseen` holds other names than those of classes, or all of them.
    """
    data, folder = settings.data, inputs["data"]
    if not folder.is_dir() or not any(folder.iterdir()):
        raise DataError(
            found=f"no data set in data/{data.name}",
            allowed="a folder of raw files, named in data.dvc",
            fix=f"`lexiseg data add {data.name} PATH --adapter {data.adapter}` with your own copy, "
            f"or `dvc pull data/{data.name}` where a remote has it",
        )
    adapter = open_adapter(data.adapter, folder, fold=data.fold)
    vocabulary = _mark_unseen(adapter.vocabulary(), data.unseen)
    samples = {split: list(adapter.samples(split)) for split in adapter.splits()}
    facts, splits, digests = [], {}, {}
    total = sum(map(len, samples.values()))
    with (
        Pool(workers=data.workers) as pool,
        tqdm(total=total, desc=f"prepare {data.name}", unit="sample", mininterval=1, file=sys.stderr) as progress,
    ):
        for split, listed in samples.items():
            source = Source(data.adapter, folder, split, data.max_pixels, len(vocabulary), data.fold)
            examined = _write_split(pool, source, listed, outputs / "dataset" / split, progress)
            facts += [one.facts for one in examined]
            digests[split] = [one.digest for one in examined]
            splits[split] = _counts(examined)
    write_manifest(outputs / "manifest.parquet", facts)
    write_json(outputs / "vocabulary.json", vocabulary.to_json())
    if isinstance(adapter, ListsEpisodes):
        write_episodes(outputs, {split: adapter.episodes(split) for split in samples}, vocabulary)
    write_json(outputs / "info.json", _info(data.name, adapter, splits, digests))


def _mark_unseen(vocabulary: Vocabulary, unseen: Sequence[str]) -> Vocabulary:
    """The vocabulary with these classes marked as unseen, beside those that the data set itself marks."""
    strangers = [name for name in unseen if name not in vocabulary.names]
    if strangers:
        owner = {word.lower(): name for name in vocabulary.names for word in vocabulary.words(name)}
        raise DataError(
            found="`data.unseen` names " + ", ".join(f"`{name}`{_nearest(name, owner)}" for name in strangers),
            allowed=f"classes of the data set, spelt as there: {', '.join(vocabulary.names) or 'it has none'}",
            fix="correct `data.unseen` in params.yaml; [] leaves the classes as the data set has them",
        )
    seen = tuple(flag and name not in unseen for name, flag in zip(vocabulary.names, vocabulary.seen, strict=True))
    if unseen and not any(seen):
        raise DataError(
            found="`data.unseen` leaves no class to train on",
            allowed=f"at least one of {', '.join(vocabulary.names)} outside of it",
            fix="take names out of `data.unseen` in params.yaml",
        )
    return replace(vocabulary, seen=seen)


def _nearest(name: str, owner: Mapping[str, str]) -> str:
    words = difflib.get_close_matches(name.lower(), owner, n=3, cutoff=0.6)
    return f" (nearest: {', '.join(dict.fromkeys(owner[word] for word in words))})" if words else ""


def _write_split(pool: Pool, source: Source, samples: list[RawSample], folder: Path, progress: tqdm) -> list[Examined]:
    examined = []
    with SplitWriter(folder) as writer:
        for chunk in pool.examine(source, samples):
            writer.add([one.row for one in chunk if one.row is not None])
            # The pictures are on disk now; what counts of a row is kept, its bytes are not.
            examined += [Examined(one.facts, None, one.digest) for one in chunk]
            progress.update(len(chunk))
        writer.finish(fingerprint=_hash([one.digest for one in examined]))
    return examined


def _counts(examined: list[Examined]) -> dict[str, int]:
    readable = [one.facts for one in examined if one.facts["readable"]]
    return {
        "count": len(readable),
        "labelled": sum("label_values" in facts for facts in readable),
        "captioned": sum(facts["caption_count"] > 0 for facts in readable),
        "unreadable": len(examined) - len(readable),
    }


def _info(name: str, adapter: Adapter, splits: dict[str, Any], digests: dict[str, list[str]]) -> dict[str, Any]:
    content = [digest for split in sorted(digests) for digest in (split, *digests[split])]
    return {
        "name": name,
        "adapter": adapter.name,
        "licence": adapter.licence,
        "splits": splits,
        "content_digest": _hash(content),
    }


def _hash(words: list[str]) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()
