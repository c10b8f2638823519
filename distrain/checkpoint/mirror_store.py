"""The mirrored checkpoints of a run in an object store, through fsspec.

::

    PLACE/run.yaml                      configuration of the run, secrets masked
    PLACE/iter_0000000100/              the files of a checkpoint, see `format`
        manifest.json                   written last: without it the rest is half an upload

Only the mirror process imports this module: fsspec starts threads and draws random numbers.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import fsspec.core
from fsspec.callbacks import Callback

from distrain.checkpoint import format as fmt
from distrain.redact import masked_text

RUN_FILE = "run.yaml"
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # of no reader
_MAX_WHY = 300  # characters of a reason
_OPTIONS: dict[str, dict[str, Any]] = {
    # 4 parts of 50 MB in memory instead of 10; the mirror process has retries of its own
    "s3": {"max_concurrency": 4, "config_kwargs": {"retries": {"max_attempts": 1}}},
    "file": {"auto_mkdir": True},
}
_SECRET_VARIABLE = re.compile(r"KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL|CONNECTION_STRING")


class StoreError(OSError):
    """An operation failed: nothing is known of the store's content. One line, without the URL."""


class LocalDiskError(StoreError):
    """The local disk is full or cannot be written; the text is its folder and the reason."""


@dataclass(frozen=True)
class Stored:
    """A checkpoint in the store.

    Attributes:
        name: of its folder.
        sizes: bytes of each file.
        manifest: None if it is missing or damaged.
        raw: bytes of a valid manifest's file.
        why_not: file and reason if it cannot be valid.
    """

    name: str
    sizes: dict[str, int]
    manifest: dict[str, Any] | None = None
    raw: bytes = b""
    why_not: str = ""

    @property
    def iteration(self) -> int:
        """Iteration in its name."""
        return fmt.iteration_of(self.name) or 0

    @property
    def is_half(self) -> bool:
        """Whether it is half an upload: its manifest is missing."""
        return fmt.MANIFEST_FILE not in self.sizes


class Place:
    """Folder in an object store that mirrors the checkpoints of one run.

    Every method raises StoreError if the store cannot be reached or refuses. For `url` see
    `mirror_url`.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        scheme = url.partition("://")[0]
        with self._errors("open"):
            options = {"use_listings_cache": False, **_OPTIONS.get(scheme, {})}
            # not url_to_fs, to which `::` in a path joins two URLs
            self._fs = fsspec.filesystem(scheme, skip_instance_cache=True, **options)
            self._root = fsspec.core.strip_protocol(self.url)
        self._is_s3 = scheme == "s3"

    @contextlib.contextmanager
    def _errors(
        self, action: str, name: str = "", *, passing: type[Exception] = StoreError
    ) -> Iterator[None]:
        """Report any exception but `passing` as StoreError: each library has its own."""
        try:
            yield
        except (passing, StoreError):
            raise
        except Exception as error:
            raise StoreError(f"{action} {name}".rstrip() + f": {one_line(error)}") from error

    def checkpoints(self) -> list[Stored]:
        """Return all checkpoints, also half uploads, newest first."""
        names = [os.path.basename(path.rstrip("/")) for path in self._list("")]
        found = [name for name in names if fmt.iteration_of(name) is not None]
        there = [self._stored(name) for name in found]
        return sorted(there, key=lambda stored: stored.iteration, reverse=True)

    def _stored(self, name: str) -> Stored:
        sizes = {os.path.basename(path): size for path, size in self._list(name).items()}
        if fmt.MANIFEST_FILE not in sizes:
            return Stored(name, sizes, why_not=f"{self.url}/{name} is half an upload")
        path = f"{name}/{fmt.MANIFEST_FILE}"
        raw = self.read(path) or b""
        try:
            manifest = fmt.parse_manifest(raw, f"{self.url}/{path}")
        except fmt.CheckpointDamaged as error:
            return Stored(name, sizes, why_not=str(error))
        why_not = ""
        if manifest["iteration"] != fmt.iteration_of(name):
            why_not = f"{self.url}/{name} holds iteration {manifest['iteration']}"
        for file, entry in manifest["files"].items():
            if sizes.get(file) != entry["bytes"]:
                size = sizes.get(file, "no")
                why_not = f"{self.url}/{name}/{file} has {size} bytes, not {entry['bytes']}"
        return Stored(name, sizes, manifest, raw, why_not)

    def _list(self, name: str) -> dict[str, int]:
        """Return the paths in a folder with their sizes; empty if there is none."""
        path = f"{self._root}/{name}" if name else self._root
        self._fs.invalidate_cache()
        try:
            with self._errors("list", name, passing=FileNotFoundError):
                found = self._fs.ls(path, detail=True)
        except FileNotFoundError as error:
            if not name:
                self._check_bucket(error)
            return {}
        # a folder lists itself where a store keeps an object for it
        return {
            each["name"]: each.get("size") or 0
            for each in found
            if each["name"].rstrip("/") != path.rstrip("/")
        }

    def _check_bucket(self, error: FileNotFoundError) -> None:
        """Raise StoreError if not the folder but its bucket is missing."""
        bucket = self._root.partition("/")[0]
        if bucket and self._root != bucket:
            with self._errors("list"):
                is_there = self._fs.exists(bucket)
        else:
            is_there = not bucket
        if not is_there:
            raise StoreError(f"there is no bucket {bucket}") from error

    def read(self, path: str) -> bytes | None:
        """Return the content of a small file; None if there is none."""
        try:
            with self._errors("read", path, passing=FileNotFoundError):
                with self._fs.open(f"{self._root}/{path}", "rb") as file:
                    data: bytes = file.read(fmt.MAX_MANIFEST_BYTES)
                return data
        except FileNotFoundError:
            return None

    def write(self, path: str, data: bytes) -> None:
        """Write a small file, and check its size."""
        with self._errors("write", path):
            self._make_folder(path)
            self._fs.pipe_file(f"{self._root}/{path}", data)
        self._check_size(path, len(data))

    def put(self, local: str, path: str) -> None:
        """Upload a file, and check its size; FileNotFoundError if there is no local file."""
        size = os.stat(local).st_size
        with self._errors("upload", path):
            self._make_folder(path)
            self._fs.put_file(local, f"{self._root}/{path}")
        self._check_size(path, size)

    def _make_folder(self, path: str) -> None:
        if not self._is_s3:
            # memory:// needs it; object stores without folders do nothing
            self._fs.makedirs(os.path.dirname(f"{self._root}/{path}"), exist_ok=True)

    def _check_size(self, path: str, size: int) -> None:
        self._fs.invalidate_cache()
        try:
            with self._errors("check", path, passing=FileNotFoundError):
                found = self._fs.info(f"{self._root}/{path}")["size"]
        except FileNotFoundError:
            found = "no"
        if found != size:
            raise StoreError(f"upload {path}: it has {found} bytes there, not {size}")

    def get(self, path: str, local: str, callback: Callback) -> None:
        """Download a file.

        Raises:
            FileNotFoundError: it is not in the store.
            LocalDiskError: the local file cannot be written.
        """
        with self._errors("download", path, passing=FileNotFoundError):
            try:
                self._fs.get_file(f"{self._root}/{path}", local, callback=callback)
            except OSError as error:
                if error.errno not in _DISK_ERRORS:
                    raise
                raise LocalDiskError(f"{os.path.dirname(local)}: {error.strerror}") from error

    def remove(self, stored: Stored) -> None:
        """Delete a checkpoint, its manifest first: no half of it counts as valid."""
        files = sorted(stored.sizes, key=lambda file: file != fmt.MANIFEST_FILE)
        for file in files:
            # files that distrain did not write stay
            if file in (*fmt.FILES, fmt.MANIFEST_FILE):
                self.remove_file(f"{stored.name}/{file}")
        if not self._is_s3:
            with contextlib.suppress(Exception):  # stores without folders have none to remove
                self._fs.rmdir(f"{self._root}/{stored.name}")

    def remove_file(self, path: str) -> None:
        """Delete a file, if there is one."""
        with (
            contextlib.suppress(FileNotFoundError),
            self._errors("delete", path, passing=FileNotFoundError),
        ):
            self._fs.rm_file(f"{self._root}/{path}")

    def abort_uploads(self) -> int:
        """Abort the multipart uploads that a killed process left; return their number.

        Their parts are invisible, but paid for. Of stores other than S3 nothing is known to remain.
        """
        if not self._is_s3:
            return 0
        bucket, _, prefix = self._root.partition("/")
        with self._errors("list the multipart uploads of"):
            answer = self._fs.call_s3(
                "list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/iter_".lstrip("/")
            )
            uploads = answer.get("Uploads", [])
            for upload in uploads:
                own = {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                self._fs.call_s3("abort_multipart_upload", **own)
        return len(uploads)


def one_line(error: BaseException) -> str:
    """Return the reason of a failure as one short line without secrets of the environment."""
    secrets = [
        value
        for name, value in os.environ.items()
        if _SECRET_VARIABLE.search(name.upper()) and len(value) >= 4
    ]
    text = " ".join(masked_text(str(error), secrets).split())
    return f"{type(error).__name__}: {text}"[:_MAX_WHY].rstrip(":. ")
