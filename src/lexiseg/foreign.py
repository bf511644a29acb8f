"""Checkpoints of other programs: tensors and settings out of them, without executing their code."""

from __future__ import annotations

import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lexiseg.errors import ModelError
from lexiseg.storage import load_tensors, sha256_of_file

# Programs whose classes are taken for plain data: their objects are read as tables, the classes never imported.
# Whatever else a pickle asks for is refused by its name.
_HARMLESS = ("argparse.", "pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.", "yacs.")
# What omegaconf's objects name beside their values: types of them. Not imported either.
_TYPES = (
    *(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "str", "tuple")),
    "collections.defaultdict",
    "typing.Any",
)
# Where checkpoints keep the weights that are meant, beside other things; "teacher": self-supervised trainings (DINO).
_TABLES = ("state_dict", "model", "teacher")


@dataclass(frozen=True)
class ForeignCheckpoint:
    """What a weight file of another program holds.

    Attributes:
        file: its name, without folders.
        sha256: of its bytes.
        tensors: by the names of that program.
        settings: what it calls hyper-parameters; empty where it has none. Values, lists of values, and tables of both
            are kept; what is nested deeper is left out.
        unread: classes of that program whose objects were read as plain tables.
    """

    file: str
    sha256: str
    tensors: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = ()


class _Inert:
    """Takes the place of a class that is not imported: makes a table of what its object held, and does nothing."""

    def __new__(cls, *arguments: Any, **named: Any) -> Any:
        return OrderedDict()  # the one table that torch's safe unpickler also gives attributes


def read_checkpoint(path: Path | str) -> ForeignCheckpoint:
    """Read a safetensors file, a state dict, or a checkpoint of PyTorch Lightning.

    Objects in a pickle that belong to a known program, such as the settings that Lightning keeps beside the weights,
    are read as tables. Any other one is refused: it could be code.

    Raises:
        ModelError: the file is missing, damaged, or asks for anything else than tensors and plain data.
    """
    path = Path(path)
    if path.suffix.lower() == ".safetensors" or not path.is_file():
        tensors = load_tensors(path)
        return ForeignCheckpoint(file=path.name, sha256=sha256_of_file(path), tensors=tensors)
    import torch
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

    _check_archive(path)
    try:
        asked = get_unsafe_globals_in_checkpoint(path)
    except OSError:
        raise
    except Exception:  # damaged, or the format before torch 1.6, which torch.load below reads or refuses
        asked = []
    strange = sorted(name for name in asked if not name.startswith(_HARMLESS) and name not in _TYPES)
    if strange:
        raise ModelError(
            found=f"{path} asks for {', '.join(strange[:5])}" + (", …" if len(strange) > 5 else ""),
            allowed="tensors and plain data; code in a weight file is never executed",
            fix="where you trust the file, load it with the program that wrote it, save its state_dict as "
            "safetensors, and import that",
        )
    try:
        with safe_globals([(_Inert, name) for name in asked]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle ends in nearly any kind of error
        raise ModelError(
            found=f"{path} is damaged, no checkpoint at all, or asks for code ({_reason(error)})",
            allowed="a complete .safetensors file, or what torch.save wrote",
            fix="fetch the file again and compare its size; a web page saved in place of a file looks like this too",
        ) from error
    content = content if isinstance(content, dict) else {}
    state = next((content[key] for key in _TABLES if isinstance(content.get(key), dict)), content)
    named = ((name, value) for name, value in state.items() if isinstance(name, str))
    tensors = {name: value for name, value in named if isinstance(value, torch.Tensor)}
    odd = sorted(name for name, value in tensors.items() if not _is_whole(value))
    if odd:
        raise ModelError(
            found=f"{path} holds tensors that are sparse, without values, or larger than what is stored of them: "
            f"{', '.join(odd[:3])}",
            allowed="dense tensors with all their values",
            fix="fetch the file again, or save `model.state_dict()` of the trained model",
        )
    if not tensors:
        raise ModelError(
            found=f"{path} holds no tensors, neither by themselves nor under `{'`, `'.join(_TABLES)}`",
            allowed="a state dict, or a checkpoint with one",
            fix="save `model.state_dict()` and import that file",
        )
    settings = _plain(content.get("hyper_parameters"), tables=2)
    return ForeignCheckpoint(
        file=path.name,
        sha256=sha256_of_file(path),
        tensors=tensors,
        settings=settings if isinstance(settings, dict) else {},
        unread=tuple(sorted(name for name in asked if name not in _TYPES)),
    )


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except OSError:
        raise
    except Exception:  # the format before torch 1.6, or damaged in nearly any way: torch.load tells
        return
    if any(part.filename.endswith("/constants.pkl") for part in parts):
        raise ModelError(
            found=f"{path} is a TorchScript archive, which holds code",
            allowed="tensors and plain data; code in a weight file is never executed",
            fix="where you trust the file, load it with torch.jit.load and save its state_dict()",
        )
    # torch.save stores without compression; a few compressed kilobytes could become more than the memory.
    compressed = [part.filename for part in parts if part.compress_type != zipfile.ZIP_STORED]
    if compressed:
        raise ModelError(
            found=f"{path} is a compressed archive ({len(compressed)} parts, such as {compressed[0]})",
            allowed="what torch.save wrote, which is not compressed",
            fix="unpack a zip file around the checkpoint first, then import the file in it",
        )


def _is_whole(tensor: Any) -> bool:
    import torch

    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


_LEFT_OUT = object()


def _plain(value: Any, *, tables: int) -> Any:
    """A value, a list of values, or a table of these with at most `tables` levels; `_LEFT_OUT` for anything else."""
    # Lists hold plain values and no lists, tables end at a level: a pickle can nest a few bytes without end.
    value = _opened(value)
    if isinstance(value, (list, tuple)):
        items = [_opened(item) for item in value]
        return items if all(_is_plain(item) for item in items) else _LEFT_OUT
    if isinstance(value, dict) and tables:
        # Lightning writes a dict, a dict with attributes, or a namespace.
        table = {**getattr(value, "__dict__", {}), **value}
        kept = {str(key): _plain(inner, tables=tables - 1) for key, inner in table.items()}
        return {key: inner for key, inner in kept.items() if inner is not _LEFT_OUT}
    return value if _is_plain(value) else _LEFT_OUT


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str, type(None)))


def _opened(value: Any) -> Any:
    """What an object of omegaconf holds: a table or a list under `_content`, a single value under `_val`."""
    own = getattr(value, "__dict__", {}) if isinstance(value, OrderedDict) else {}
    return own.get("_content", own.get("_val", value))


def _reason(error: Exception) -> str:
    # torch's own text recommends to read such a file with its code.
    named = re.search(r"GLOBAL (\S+)", str(error))
    return f"it asks for {named[1]}" if named else type(error).__name__
