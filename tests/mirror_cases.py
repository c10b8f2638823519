"""For tests of the mirror: a place, retention, and the download at a start."""

from pathlib import Path

from s3_server import BUCKET

from distrain.checkpoint.mirror import Fetch

KEEP = {"last": 3, "every": None}
URL = f"s3://{BUCKET}/runs/mine"


def fetched(folder: Path, url: str = URL, newer_than: int = -1) -> Fetch:
    fetch = Fetch(url, folder, newer_than=newer_than)
    try:
        list(fetch.look())
        list(fetch.download())
    finally:
        fetch.close()
    return fetch
