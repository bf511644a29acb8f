"""The buckets of the team's S3 store: made, copied out, copied back. Address and key come from boto3's variables.

python team/bucket.py create
python team/bucket.py save backup/objects
python team/bucket.py load backup/objects
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError

BUCKETS = ("mlflow", "dvc")


def create(store: Any) -> None:
    """Make the buckets that are not there."""
    for bucket in BUCKETS:
        try:
            store.create_bucket(Bucket=bucket)
        except ClientError as error:
            if error.response["Error"]["Code"] not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                raise


def save(store: Any, folder: Path) -> None:
    """Copy every object to FOLDER/BUCKET/KEY. What an earlier copy has is not fetched again."""
    part = folder / "unfinished.part"  # a copy that was stopped is no copy; beside the buckets no object has its name
    for bucket in BUCKETS:
        (folder / bucket).mkdir(parents=True, exist_ok=True)
        copied = 0
        for found in _objects(store, bucket):
            target = _inside(folder / bucket, found["Key"])
            stamp = found["LastModified"].timestamp()
            if target.exists() and (target.stat().st_size, target.stat().st_mtime) == (found["Size"], stamp):
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            store.download_file(bucket, found["Key"], str(part))
            os.utime(part, (stamp, stamp))
            part.replace(target)
            copied += 1
        print(f"{bucket}: {copied} objects copied")


def load(store: Any, folder: Path) -> None:
    """Copy everything of FOLDER/BUCKET back into the store."""
    missing = [bucket for bucket in BUCKETS if not (folder / bucket).is_dir()]
    if missing:
        raise SystemExit(
            f"found: no {' and no '.join(missing)} in {folder}\n"
            f"allowed: a folder that `save` has written, with {' and '.join(BUCKETS)} in it\n"
            "to do: name that folder"
        )
    create(store)
    for bucket in BUCKETS:
        place = folder / bucket
        paths = sorted(path for path in place.rglob("*") if path.is_file())
        for path in paths:
            store.upload_file(str(path), bucket, path.relative_to(place).as_posix())
        print(f"{bucket}: {len(paths)} objects copied back")


def _objects(store: Any, bucket: str) -> Iterator[dict[str, Any]]:
    for page in store.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        # A key that ends in a slash is a folder to some stores, and holds nothing.
        yield from (found for found in page.get("Contents", []) if not found["Key"].endswith("/"))


def _inside(folder: Path, key: str) -> Path:
    target = folder / key
    if not target.resolve().is_relative_to(folder.resolve()):
        raise SystemExit(f"found: an object named {key!r}\nallowed: names that stay in {folder}\nto do: rename it")
    return target


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description="The buckets of the team's S3 store.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("create", help="make the buckets that are not there")
    for name, text in (("save", "copy all objects to a folder"), ("load", "copy a folder back")):
        commands.add_parser(name, help=text).add_argument("folder", type=Path)
    given = parser.parse_args()
    try:
        store = boto3.client("s3")
        if given.command == "create":
            create(store)
        else:
            (save if given.command == "save" else load)(store, given.folder)
    except (BotoCoreError, Boto3Error, ClientError, OSError) as error:
        raise SystemExit(
            f"found: {error}\n"
            "allowed: a store that answers and lets you in, and a folder that can be read and written\n"
            "to do: set AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_DEFAULT_REGION"
        ) from None


if __name__ == "__main__":
    main()
