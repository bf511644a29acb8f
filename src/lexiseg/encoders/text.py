"""The text side: labels -> unit vectors, from a CLIP, a table of precomputed vectors, or a sentence encoder."""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lexiseg.encoders.cache import EmbeddingCache
from lexiseg.encoders.clip import FrozenClip, load_clip
from lexiseg.encoders.settings import TextSettings
from lexiseg.errors import LabelError, ModelError
from lexiseg.storage import hash_tree, load_tensors, read_json, save_tensors, sha256_of_file, sha256_of_json, write_json
from lexiseg.vocabulary import Vocabulary
from lexiseg.workspace import resolve_weights


class TextEncoder(Protocol):
    """What every text side can do."""

    dim: int
    licence: str

    def embed(self, labels: Sequence[str]) -> Tensor:
        """Unit vectors float32 (N, C) of any labels, in their order."""
        ...

    def unknown_words(self, label: str) -> list[str]:
        """Words the encoder has never seen, where it knows."""
        ...

    def stand_in(self, label: str) -> str | None:
        """The word really used for the label where that is another one by declaration, else None."""
        ...


class ClipText:
    """Labels through a CLIP text tower: the mean of the label in each template, normalised.

    Args:
        clip: the tower.
        templates: sentences with one {} each.
        identity: of the tower, for the cache.
        cache: of the vectors of single sentences.
        average: "unit": each sentence's vector is normalised before the mean is taken. "raw": it is not, as in TCL's
            code.
    """

    def __init__(
        self,
        clip: FrozenClip,
        *,
        templates: Sequence[str],
        identity: str,
        cache: EmbeddingCache,
        average: Literal["unit", "raw"] = "unit",
    ) -> None:
        self._clip, self._templates, self._cache, self._raw = clip, templates, cache, average == "raw"
        self._identity = f"{identity} raw" if self._raw else identity
        self.dim, self.licence = clip.dim, clip.licence

    def embed(self, labels: Sequence[str]) -> Tensor:
        compute = partial(self._clip.embed_texts, normalise=not self._raw)
        vectors = self._cache.fetch(self._identity, _prompts(labels, self._templates), compute)
        return _mean_of_prompts(vectors, labels)

    def unknown_words(self, label: str) -> list[str]:
        return self._clip.unknown_words(label)

    def stand_in(self, label: str) -> str | None:
        return None


class TableText:
    """Labels looked up in a table of precomputed vectors.

    A label is a row's name, a word that the vocabulary holds for the same class (see `Vocabulary.synonyms`),
    or has a declared stand-in; anything else is refused with the nearest names.

    Args:
        names: of the rows.
        vectors: float (N, C), normalised here.
        words: other words -> row name.
        stand_ins: class names without a row of their own -> the row used instead.
        licence: of the vectors.
    """

    def __init__(
        self,
        *,
        names: Sequence[str],
        vectors: Tensor,
        words: Mapping[str, str],
        stand_ins: Mapping[str, str],
        licence: str,
    ) -> None:
        self._vectors = F.normalize(vectors.float(), dim=-1)
        self._rows = {_plain(name): row for row, name in enumerate(names)}
        self._words = {_plain(word): name for word, name in words.items()}
        self._stand_ins = {_plain(word): name for word, name in stand_ins.items()}
        self.names = tuple(names)
        self.dim, self.licence = int(vectors.shape[1]), licence

    def embed(self, labels: Sequence[str]) -> Tensor:
        return self._vectors[[self._row(label) for label in labels]].clone()

    def unknown_words(self, label: str) -> list[str]:
        return []

    def stand_in(self, label: str) -> str | None:
        plain = _plain(label)
        return self._stand_ins.get(plain) if plain not in self._rows and plain not in self._words else None

    def _row(self, label: str) -> int:
        plain = _plain(label)
        target = plain if plain in self._rows else self._words.get(plain, self._stand_ins.get(plain))
        if target is None:
            allowed = sorted(self._rows.keys() | self._words.keys() | self._stand_ins.keys())
            near = _nearest(plain, allowed)
            some = f"the nearest: {', '.join(near)}" if near else f"such as {', '.join(allowed[:5])}"
            raise LabelError(
                found=f"the label `{label}` has no vector in the text table",
                allowed=f"{len(allowed)} words, {some}",
                fix="use one of them, add the word as a synonym of a class, or use a model with a text encoder",
            )
        return self._rows[_plain(target)]


class SentenceText:
    """Labels through a sentence-transformers model (extra `sentence-transformers`)."""

    def __init__(
        self, folder: Path, *, templates: Sequence[str], identity: str, cache: EmbeddingCache, licence: str
    ) -> None:
        self._model = _sentence_model(str(folder))
        self._templates, self._identity, self._cache = templates, identity, cache
        self.dim, self.licence = int(self._model.get_embedding_dimension()), licence

    def embed(self, labels: Sequence[str]) -> Tensor:
        vectors = self._cache.fetch(self._identity, _prompts(labels, self._templates), self._compute)
        return _mean_of_prompts(vectors, labels)

    def unknown_words(self, label: str) -> list[str]:
        return []

    def stand_in(self, label: str) -> str | None:
        return None

    def _compute(self, texts: list[str]) -> Tensor:
        # One text at a time: padding to the longest of a batch would change the last bits.
        rows = [self._model.encode(text, convert_to_tensor=True, normalize_embeddings=True) for text in texts]
        return torch.stack(rows).float().cpu()


def save_text(folder: Path, settings: TextSettings, vocabulary: Vocabulary) -> None:
    """Write the text side of an encode folder (`folder/text`), unless the settings want none.

    Raises:
        LabelError: a class name has neither a row, a synonym with a row, nor a declared stand-in.
        ModelError: a table or model cannot be read.
    """
    if settings.source == "none":
        return
    target = folder / "text"
    target.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {"source": settings.source, "licence": settings.licence}
    config["templates"] = list(vocabulary.templates) if settings.templates == "vocabulary" else ["{}"]
    if settings.source == "table":
        names, vectors = _read_table(settings)
        rows = {_plain(name): name for name in names}
        words = {}
        for name in vocabulary.names:
            options = [name, *vocabulary.synonyms.get(name, ())]
            row = next((rows[_plain(option)] for option in options if _plain(option) in rows), None)
            if row is not None:
                words.update({option: row for option in options if _plain(option) not in rows})
        lacking = [n for n in vocabulary.names if _plain(n) not in rows and n not in words]
        stand_ins = {name: settings.stand_ins[name] for name in lacking if name in settings.stand_ins}
        bad = [name for name in lacking if _plain(stand_ins.get(name, "")) not in rows]
        if bad:
            raise LabelError(
                found=f"no row in {settings.path} for " + ", ".join(_lacking(name, stand_ins, rows) for name in bad),
                allowed=f"one of its {len(names)} names ({', '.join(list(names)[:8])}, …)",
                fix="give the class a synonym that has a row, or declare a stand-in in `encode.text.stand_ins`",
            )
        # Synonyms of such a class are stood in for too: they are no other words for the row.
        stand_ins |= {word: row for name, row in stand_ins.items() for word in vocabulary.synonyms.get(name, ())}
        config |= {"names": list(names), "words": words, "stand_ins": stand_ins}
        save_tensors(target / "vectors.safetensors", {"vectors": vectors})
    elif settings.source == "sentence_transformers":
        path = resolve_weights(str(settings.path))
        model = _sentence_model(str(path) if path.is_dir() else str(settings.path))
        model.save(str(target / "model"), create_model_card=False)
    write_json(target / "text.json", config)


def load_text(folder: Path, *, cache: EmbeddingCache | None = None) -> TextEncoder:
    """Read the text side of an encode folder or of a model folder."""
    path = folder / "text" / "text.json"
    if not path.is_file():
        raise ModelError(
            found=f"{folder} has no text/text.json",
            allowed="a folder written by the encode or register stage, with another `encode.text.source` than none",
            fix="run `dvc repro`, or name the right folder",
        )
    config = read_json(path)
    cache = cache or EmbeddingCache.of_working_tree()
    if config["source"] == "table":
        vectors = load_tensors(folder / "text" / "vectors.safetensors")["vectors"]
        return TableText(
            names=config["names"],
            vectors=vectors,
            words=config["words"],
            stand_ins=config["stand_ins"],
            licence=config["licence"],
        )
    model_folder = folder / ("clip" if config["source"] == "clip" else "text/model")
    # The same weights give other vectors under other code, and other last bits with another torch or thread count.
    circumstances = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "code": hash_tree(Path(__file__).parent, pattern="*.py"),
        "packages": {name: _version(name) for name in ("open_clip_torch", "sentence-transformers", "transformers")},
    }
    identity = sha256_of_json({"files": hash_tree(model_folder), **circumstances})
    if config["source"] == "clip":
        return ClipText(
            load_clip(model_folder, visual=False),
            templates=config["templates"],
            identity=identity,
            cache=cache,
            average=config.get("average", "unit"),
        )
    return SentenceText(
        model_folder, templates=config["templates"], identity=identity, cache=cache, licence=config["licence"]
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def copy_text(source: Path, target: Path) -> None:
    """Copy what `load_text` needs from an encode folder into a model folder."""
    shutil.copytree(source / "text", target / "text")
    if read_json(source / "text" / "text.json")["source"] == "clip":
        shutil.copytree(source / "clip", target / "clip")


def _prompts(labels: Sequence[str], templates: Sequence[str]) -> list[str]:
    return [template.replace("{}", label) for label in labels for template in templates]


def _mean_of_prompts(vectors: Tensor, labels: Sequence[str]) -> Tensor:
    # (labels * templates, C) vectors -> (labels, C) unit vectors
    return F.normalize(vectors.view(len(labels), -1, vectors.shape[-1]).mean(dim=1), dim=-1)


def _plain(word: str) -> str:
    return " ".join(word.lower().replace("_", " ").split())


def _nearest(plain: str, words: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(plain, list(words), n=5, cutoff=0.4)


def _lacking(name: str, stand_ins: Mapping[str, str], rows: Iterable[str]) -> str:
    # A class without a row, with what may have been meant.
    if name in stand_ins:
        near = _nearest(_plain(stand_ins[name]), rows)
        return f"{name} nor for its stand-in `{stand_ins[name]}`" + (f" (nearest: {', '.join(near)})" if near else "")
    near = _nearest(_plain(name), rows)
    return name + (f" (nearest: {', '.join(near)})" if near else "")


def _read_table(settings: TextSettings) -> tuple[list[str], Tensor]:
    path = resolve_weights(str(settings.path))
    names_path = path.with_suffix(".names.txt")
    if not path.is_file() or not names_path.is_file():
        raise ModelError(
            found=f"no text table at {path} with {names_path.name} beside it",
            allowed="a .npy matrix (N, C) and a .names.txt whose line i names row i",
            fix="copy both with `lexiseg weights add FILE`",
        )
    # Over both files: the same matrix with other names is another table.
    if (actual := sha256_of_file(path, names_path)) != settings.sha256:
        raise ModelError(
            found=f"{path} and {names_path.name} have sha256 {actual}",
            allowed=f"sha256 {settings.sha256}, as `encode.text.sha256` says",
            fix="fetch the file again, or put the new hash into params.yaml if the change is meant",
        )
    try:
        names = names_path.read_text(encoding="utf-8").splitlines()
        vectors = np.load(path, allow_pickle=False).astype(np.float32)
    except OSError:
        raise
    except Exception as error:  # damaged, an archive, not UTF-8, or a pickle, which is never opened
        raise ModelError(
            found=f"the text table {path} cannot be read ({' '.join(str(error).split())[:300]})",
            allowed="a .npy matrix of numbers and a UTF-8 .names.txt",
            fix="fetch both files again",
        ) from error
    if vectors.ndim != 2 or len(names) != len(vectors):
        raise ModelError(
            found=f"{path} has shape {vectors.shape} and {names_path.name} {len(names)} lines",
            allowed="a matrix with one row per name",
            fix="use the pair that belongs together",
        )
    if not np.isfinite(vectors).all():
        raise ModelError(
            found=f"{path} holds values that are not finite",
            allowed="a matrix of finite numbers",
            fix="compute or fetch the table again",
        )
    return names, torch.from_numpy(vectors)


def _sentence_model(name: str) -> Any:
    try:
        from sentence_transformers import SentenceTransformer  # type: ignore[import-not-found]
    except ImportError as error:
        raise ModelError(
            found="encode.text.source is sentence_transformers, but the package is not installed",
            allowed="an installation with the extra",
            fix="pip install -c constraints.txt -e '.[sentence-transformers]'",
        ) from error
    try:
        return SentenceTransformer(name, device="cpu", trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(
            found=f"no sentence-transformers model `{name}` ({' '.join(str(error).split())[:300]})",
            allowed="a local folder, or a name while the hub can be reached",
            fix="check `encode.text.path`",
        ) from error
