"""Whether a request can be served: looked at before MLflow and the model see it, and before a picture is decoded."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from io import BytesIO
from typing import Any

from PIL import Image

from lexiseg.serving.limits import Limits
from lexiseg.serving.refusals import ContentTypeError, FormError, RequestError
from lexiseg.tracking.pyfunc_model import IMAGE, LABELS

SPLIT, RECORDS = "dataframe_split", ("dataframe_records", "inputs", "instances")
JSON = "application/json"
EXAMPLE = f'{{"dataframe_split": {{"columns": ["{IMAGE}"], "data": [["…"]]}}, "params": {{"{LABELS}": ["grass"]}}}}'
AS_BASE64 = "send base64.b64encode(Path('photo.jpg').read_bytes()).decode()"
# Not all that Pillow knows: it hands PostScript to an interpreter of its own.
FORMATS = ("PNG", "JPEG", "JPEG2000", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "PPM")
_SHOWN = 60  # characters of what a client sent that an answer repeats


def check_type(content_type: str) -> None:
    """Only JSON in UTF-8 is read.

    Raises:
        ContentTypeError: it is of another type.
    """
    kind, *parameters = (part.strip().lower() for part in content_type.split(";"))
    if kind == JSON and all(part in ("", "charset=utf-8", 'charset="utf-8"') for part in parameters):
        return
    raise ContentTypeError(
        found=f"the content type {_shown(content_type)}" if content_type else "no content type",
        allowed=f"{JSON}, in UTF-8",
        fix=f"send the header Content-Type: {JSON}",
    )


def check_body(body: bytes, limits: Limits) -> None:
    """Whether a body holds pictures and labels as the model takes them, within the limits.

    Whether a picture is whole and the model knows the labels comes out when they are used.

    Raises:
        FormError: it is not JSON of the form of a request.
        RequestError: it asks for what cannot be done.
    """
    request = _parsed(body)
    _check_labels(request.get("params", {}), limits)
    pictures = _pictures(request)
    if not 0 < len(pictures) <= limits.pictures:
        raise _wrong(
            f"{len(pictures)} pictures in one request",
            f"1 to {limits.pictures}",
            "send them in several requests, which may come at the same time",
        )
    pixels = sum(_pixels(content, row) for row, content in enumerate(pictures))
    if pixels > limits.pixels:
        raise _wrong(
            f"pictures of {pixels} pixels in one request",
            f"at most {limits.pixels}, of all its pictures together",
            "scale them down, or send them one by one; `lexiseg serve --max-pixels` sets the limit",
        )


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        request = json.loads(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _bad("a body that is not UTF-8", "JSON in UTF-8", f"send it like {EXAMPLE}") from error
    except RecursionError as error:
        raise _bad("JSON that is nested too deep", "lists in lists, as in the example", f"send {EXAMPLE}") from error
    except ValueError as error:
        raise _bad(f"a body that is not JSON ({error})", "JSON", f"send it like {EXAMPLE}") from error
    if not isinstance(request, dict):
        raise _bad(f"JSON that is {_kind(request)}", "an object", f"send it like {EXAMPLE}")
    tables = [key for key in request if key in (SPLIT, *RECORDS)]
    others = [key for key in request if key not in (*tables, "params")]
    if others or len(tables) != 1:
        raise _bad(
            f"an object with {', '.join(_shown(key) for key in list(request)[:5]) or 'nothing in it'}",
            f"params, and one of {SPLIT}, {', '.join(RECORDS)}",
            f"send it like {EXAMPLE}",
        )
    return request


def _check_labels(params: Any, limits: Limits) -> None:
    """Form and number of the labels; without any, the model says whether it has names of its own."""
    if not isinstance(params, dict) or not set(params) <= {LABELS}:
        raise _wrong(
            f"{_kind(params)}{_keys(params)} for params", f"an object with {LABELS} alone", f"send it like {EXAMPLE}"
        )
    labels = _list(params.get(LABELS, []), LABELS)
    if len(labels) > limits.labels:
        raise _wrong(
            f"{len(labels)} labels",
            f"at most {limits.labels}",
            "ask for fewer; `lexiseg serve --max-labels` sets the limit",
        )
    for position, label in enumerate(labels):
        if not isinstance(label, str):
            raise _wrong(f"{_kind(label)} for the label number {position}", "texts", "send names of things")
        if len(label) > limits.label_characters:
            raise _wrong(
                f"a label of {len(label)} characters (number {position})",
                f"at most {limits.label_characters}",
                "name the thing in a few words",
            )
        if not _is_utf8(label):
            raise _wrong(
                f"half a character in the label number {position} (a lone surrogate)",
                "text that can be written as UTF-8",
                "write the whole character",
            )


def _pictures(request: Mapping[str, Any]) -> list[Any]:
    """What stands in the column of the pictures, row by row."""
    if SPLIT in request:
        table = request[SPLIT]
        if not isinstance(table, dict) or not set(table) <= {"columns", "data", "index"}:
            raise _wrong(
                f"{_kind(table)}{_keys(table)} for {SPLIT}",
                "an object with columns and data",
                f"send it like {EXAMPLE}",
            )
        columns = table.get("columns")
        if columns != [IMAGE]:
            names = ", ".join(map(_shown, columns[:5])) if isinstance(columns, list) else _kind(columns)
            raise _wrong(f"the columns {names or '(none)'}", f"the column {IMAGE} alone", f"send it like {EXAMPLE}")
        rows = _list(table.get("data"), "data")
        for row in rows:
            if len(_list(row, "a row of data")) != 1:
                raise _wrong(f"a row of data with {len(row)} values", "one, the picture", f"send it like {EXAMPLE}")
        # MLflow would repeat the rows until a longer index is full.
        index = _list(table.get("index", list(range(len(rows)))), "index")
        if len(index) != len(rows) or not all(isinstance(name, int | str) for name in index):
            raise _wrong(
                f"an index of {len(index)} names for {len(rows)} rows",
                "a number or a text for every row",
                "leave the index out",
            )
        return [row[0] for row in rows]
    name = next(key for key in RECORDS if key in request)
    rows = _list(request[name], name)
    for row in rows:
        if not isinstance(row, dict) or set(row) != {IMAGE}:
            raise _wrong(
                f"{_kind(row)}{_keys(row)} in {name}",
                f"a list of objects with {IMAGE} alone",
                f'send it like {{"{name}": [{{"{IMAGE}": "…"}}]}}',
            )
    return [row[IMAGE] for row in rows]


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise _wrong(f"{_kind(value)} for {name}", "a list", f"send it like {EXAMPLE}")
    return value


def _pixels(content: Any, row: int) -> int:
    """Width times height of a picture, of which no more than the header is read."""
    name = f"{IMAGE} of row {row}"
    if not isinstance(content, str):
        raise _wrong(f"{name} is {_kind(content)}", "the bytes of a PNG or JPEG file as base64 text", AS_BASE64)
    try:
        file = base64.b64decode(content, validate=True)
    except ValueError as error:
        raise _wrong(
            f"{name} is not base64" + (f" but {_shown(content)}" if len(content) <= 500 else f" ({error})"),
            "the bytes of a PNG or JPEG file as base64 text; the server reads no paths and no addresses",
            AS_BASE64,
        ) from error
    if not file:
        raise _wrong(f"{name} is empty (0 bytes)", "the bytes of a PNG or JPEG file as base64 text", AS_BASE64)
    try:
        with Image.open(BytesIO(file), formats=FORMATS) as picture:
            return picture.width * picture.height
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _wrong(
            f"{name} has too many pixels; it may be a decompression bomb",
            "a picture of fewer pixels than the server's limit",
            "scale the picture down",
        ) from error
    except Exception as error:  # depending on format and place of the damage, nearly any kind
        raise _wrong(
            f"{name} is not a picture in a known format",
            ", ".join(FORMATS),
            "export the picture as PNG or JPEG",
        ) from error


def _wrong(found: str, allowed: str, fix: str) -> RequestError:
    return RequestError(found=found, allowed=allowed, fix=fix)


def _bad(found: str, allowed: str, fix: str) -> FormError:
    return FormError(found=found, allowed=allowed, fix=fix)


def _keys(value: Any) -> str:
    """The names in an object, to follow `_kind`."""
    return f" with {', '.join(map(_shown, list(value)[:5])) or 'nothing in it'}" if isinstance(value, dict) else ""


def _kind(value: Any) -> str:
    """What a value of JSON is, in words."""
    if isinstance(value, bool):
        return "true or false"
    if value is None:
        return "nothing (null)"
    names = {str: "a text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names[type(value)]


def _shown(value: Any) -> str:
    """What a client sent, short and printable."""
    text = str(value)
    return ascii(text[:_SHOWN]) + ("…" if len(text) > _SHOWN else "")


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
