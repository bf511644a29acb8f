"""What validate expects of a data set: Great Expectations on the manifest.

Great Expectations cannot open pictures; prepare wrote the facts, `judged` puts them into one flat table, and
each `Check` is one expectation about it with its severity, what to say about a sample, and what to do.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from lexiseg.data.manifest import SCHEMA
from lexiseg.data.settings import DataSettings

os.environ["GX_ANALYTICS_ENABLED"] = "false"  # before the import: it would report usage otherwise

import great_expectations as gx
import great_expectations.expectations as gxe
from great_expectations.core import ExpectationSuiteValidationResult
from great_expectations.data_context.types.base import ProgressBarsConfig
from great_expectations.expectations.expectation import Expectation

Row = dict[str, Any]
Rows = list[Row]

# Modes of picture files that are turned into RGB without loss of meaning.
_MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "LAB"]
_MODES_16 = ["I;16", "I;16B", "I;16L", "I;16N"]


class ExpectNoUnknownLabels(gxe.ExpectColumnValuesToBeBetween):
    """Masks hold ids of the vocabulary or "no label", nothing else."""

    column: str = "unknown_label_count"
    min_value: Any = 0
    max_value: Any = 0
    description: Any = "Every label id in a mask is one of the vocabulary, or means that there is no label."


class ExpectMaskOfPictureSize(gxe.ExpectColumnValuesToBeInSet):
    """A mask has the width and height of its picture."""

    column: str = "mask_agrees"
    value_set: Any = (True,)
    description: Any = "Each mask has the size of its picture."


class ExpectPanopticToAgree(gxe.ExpectColumnValuesToBeInSet):
    """A panoptic mask has the size of its picture and the segments of its table."""

    column: str = "panoptic_agrees"
    value_set: Any = (True,)
    description: Any = "Each panoptic mask has the size of its picture and the segments that its table lists."


class ExpectPictureInOneSplit(gxe.ExpectColumnValuesToBeBetween):
    """No picture is in two splits: a test picture that was trained on makes every number too good."""

    column: str = "split_count"
    min_value: Any = 1
    max_value: Any = 1
    description: Any = "No picture is in two splits (compared by size and decoded pixels)."


@dataclass(frozen=True)
class Check:
    """One expectation and how its failures are reported.

    Attributes:
        name: its name in validation.json.
        expectation: the expectation of Great Expectations on the columns of `judged`.
        fix: what to do about a failure.
        found: what to say about a sample that fails, from its row of `judged`; for a check that is about the
            whole data set, from all rows.
        samples: True = about samples, False = about the whole data set.
        error: True stops the pipeline; False is a warning.
    """

    name: str
    expectation: Expectation
    fix: str
    found: Callable[[Any], str]
    samples: bool = True
    error: bool = True


_JUDGED = (
    "row",
    "place",
    "filled_split",
    "short_side",
    "pixels",
    "unknown_label_count",
    "mask_agrees",
    "panoptic_agrees",
    "split_count",
)


def judged(manifest: Rows) -> Rows:
    """The rows of the manifest with what the expectations look at, and their number as `row`."""
    splits_of = defaultdict(set)
    for row in manifest:
        splits_of[row["image_sha256"]].add(row["split"])
    return [
        row
        | {
            "row": number,
            "place": f"{row['split']}/{row['id']}",
            "filled_split": row["split"] if row["readable"] else None,
            "short_side": _given(row, lambda row: min(row["width"], row["height"]), "width"),
            "pixels": _given(row, lambda row: row["width"] * row["height"], "width"),
            "unknown_label_count": _given(row, lambda row: len(row["unknown_labels"]), "unknown_labels"),
            "mask_agrees": _given(row, lambda row: _same_size(row, "mask"), "mask_width"),
            "panoptic_agrees": _given(
                row, lambda row: _same_size(row, "panoptic") and row["segments_agree"], "panoptic_width"
            ),
            "split_count": _given(row, lambda row: len(splits_of[row["image_sha256"]]), "image_sha256"),
        }
        for number, row in enumerate(manifest)
    ]


def _given(row: Row, value: Callable[[Row], Any], name: str) -> Any:
    return None if row[name] is None else value(row)


def _same_size(row: Row, mask: str) -> bool:
    return row[f"{mask}_width"] == row["width"] and row[f"{mask}_height"] == row["height"]


def _empty_splits(data: DataSettings, rows: Rows) -> list[str]:
    return sorted(set(data.required_splits) - {row["filled_split"] for row in rows})


def checks(data: DataSettings, rows: Rows) -> list[Check]:
    """The checks for a data set under its settings.

    Args:
        data: limits and required splits.
        rows: the rows made by `judged`, for naming the other copies of a picture.
    """
    copies = defaultdict(list)
    for row in rows:
        copies[row["image_sha256"]].append(row["place"])

    def others(row: Row) -> str:
        same = sorted(place for place in copies[row["image_sha256"]])
        same.remove(row["place"])
        return f"the same picture as {', '.join(same[:3])}" + (" …" if len(same) > 3 else "")

    return [
        Check(
            "row_count",
            gxe.ExpectTableRowCountToBeBetween(min_value=1),
            "add pictures to the raw data",
            lambda rows: f"{len(rows)} samples",
            samples=False,
        ),
        Check(
            "required_splits",
            gxe.ExpectColumnDistinctValuesToContainSet(column="filled_split", value_set=sorted(data.required_splits)),
            "add pictures to these splits, or take them out of `data.required_splits`",
            lambda rows: f"no readable sample in {', '.join(_empty_splits(data, rows))}",
            samples=False,
        ),
        Check(
            "readable",
            gxe.ExpectColumnValuesToBeInSet(column="readable", value_set=[True]),
            "mend or remove these files",
            lambda row: row["reason"],
        ),
        Check(
            "unique_ids",
            gxe.ExpectCompoundColumnsToBeUnique(column_list=["split", "id"]),
            "give each picture of a split its own name (without the ending)",
            lambda row: row["file"],
        ),
        Check(
            "smallest_size",
            gxe.ExpectColumnValuesToBeBetween(column="short_side", min_value=data.min_side),
            "remove these pictures, or lower `data.min_side`",
            lambda row: f"{row['width']} x {row['height']}",
        ),
        Check(
            "largest_size",
            gxe.ExpectColumnValuesToBeBetween(column="pixels", max_value=data.max_pixels),
            "scale these pictures down, or raise `data.max_pixels`",
            lambda row: f"{row['width']} x {row['height']}",
        ),
        Check(
            "mode",
            gxe.ExpectColumnValuesToBeInSet(column="mode", value_set=_MODES + _MODES_16),
            "convert these pictures to RGB",
            lambda row: f"mode {row['mode']}",
        ),
        Check(
            "labels_in_vocabulary",
            ExpectNoUnknownLabels(),
            "correct these masks, or add the ids to the data set's list of classes",
            lambda row: f"ids {', '.join(map(str, row['unknown_labels']))}",
        ),
        Check(
            "mask_size",
            ExpectMaskOfPictureSize(),
            "scale these masks to their pictures (nearest neighbour); pictures count after their EXIF rotation",
            lambda row: f"mask {row['mask_width']} x {row['mask_height']}, picture {row['width']} x {row['height']}",
        ),
        Check(
            "ignored_share",
            gxe.ExpectColumnValuesToBeBetween(
                column="ignored_share", min_value=0, max_value=data.max_ignored_share, strict_max=True
            ),
            "remove these masks (a picture may stand without one), or raise `data.max_ignored_share`",
            lambda row: f"{row['ignored_share']:.1%} of the pixels without a label",
        ),
        Check(
            "panoptic",
            ExpectPanopticToAgree(),
            "make these panoptic masks and their segment tables agree",
            lambda row: (
                f"mask {row['panoptic_width']} x {row['panoptic_height']}, picture {row['width']} x {row['height']}"
            ),
        ),
        Check(
            "captions_not_empty",
            gxe.ExpectColumnValuesToBeBetween(column="caption_words_min", min_value=1),
            "remove the empty captions",
            lambda row: "an empty caption",
        ),
        Check(
            "caption_length",
            gxe.ExpectColumnValuesToBeBetween(column="caption_words_max", max_value=data.max_caption_words),
            "shorten these captions, or raise `data.max_caption_words`",
            lambda row: f"{row['caption_words_max']} words",
        ),
        Check(
            "duplicates_across_splits",
            ExpectPictureInOneSplit(),
            "remove the copies from all splits but one",
            others,
        ),
        Check(
            "duplicates_within_split",
            gxe.ExpectCompoundColumnsToBeUnique(
                column_list=["split", "image_sha256"], ignore_row_if="any_value_is_missing"
            ),
            "remove the copies unless they are meant: each counts as a sample of its own",
            others,
            error=False,
        ),
    ]


@dataclass(frozen=True)
class Outcome:
    """Whether an expectation is met, and the rows that fail it (empty for checks of the whole data set)."""

    success: bool
    rows: Rows


def outcomes(rows: Rows, suite: list[Check]) -> dict[str, Outcome]:
    """Run the checks on rows made by `judged`; the outcome of each by its name."""
    found = {}
    for part in judge(rows, suite, index=["row"]).results:
        config, info = part.expectation_config, part.exception_info
        name = config.meta["name"] if config and config.meta else ""
        for entry in [info] if "raised_exception" in info else info.values():  # one, or one per metric
            if entry["raised_exception"]:
                raise RuntimeError(f"the expectation {name} could not be judged: {entry['exception_message']}")
        failed = {entry["row"] for entry in part.result.get("unexpected_index_list") or []}
        found[name] = Outcome(bool(part.success), [rows[number] for number in sorted(failed)])
    return found


def judge(rows: Rows, suite: list[Check], *, index: list[str]) -> ExpectationSuiteValidationResult:
    """Great Expectations' own result; `meta["name"]` of each expectation is its check's name.

    Args:
        rows: made by `judged`.
        suite: the checks.
        index: columns by which rows that fail are listed.
    """
    # Named, so that a data set without samples has the columns too.
    table = pd.DataFrame({name: [row[name] for row in rows] for name in (*SCHEMA.names, *_JUDGED)})
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    asset = context.data_sources.add_pandas("prepared").add_dataframe_asset("manifest")
    batch = asset.add_batch_definition_whole_dataframe("all").get_batch({"dataframe": table})
    expectations = [
        check.expectation.copy(
            update={"meta": {"name": check.name}, "severity": "critical" if check.error else "warning"}
        )
        for check in suite
    ]
    form = {"result_format": "COMPLETE", "unexpected_index_column_names": index}
    return batch.validate(gx.ExpectationSuite(name="manifest", expectations=expectations), result_format=form)
