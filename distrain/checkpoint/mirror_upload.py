"""Upload the published checkpoints of a run to its mirror; retention there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

from distrain.checkpoint import format as fmt
from distrain.checkpoint.mirror_status import MirrorStatus, write_status
from distrain.checkpoint.mirror_store import RUN_FILE, Place, Stored, StoreError
from distrain.checkpoint.retention import lasting_of, list_own, read_run_id
from distrain.files.retry import read_file
from distrain.run_layout import CONFIG_FILE, STARTS_FILE

Own = list[tuple[int, str, dict[str, Any]]]  # iteration, path or name, and manifest; newest first


class OtherRun(Exception):
    """The mirror is that of another run, or in a run folder; nothing there is touched."""


class Uploader:
    """Brings a mirror up to date with the local checkpoints of a run, one upload per `step`.

    The newest checkpoint comes first, then those that are kept for good (best, every n-th): where
    uploads are slower than saves, others are skipped.

    Args:
        place: the mirror.
        folder: `RUN/checkpoints`.
        keep: "last" and "every", see `CheckpointStore`.
        old: iterations of local checkpoints that are not counted if they are skipped.
        report: called with the event of each upload and each skipped checkpoint.
    """

    def __init__(
        self,
        place: Place,
        folder: str,
        *,
        keep: dict[str, Any],
        old: Iterable[int] = (),
        report: Callable[[dict[str, Any]], None],
    ) -> None:
        self.status = MirrorStatus(place.url)
        self._place, self._folder, self._keep, self._report = place, folder, keep, report
        self._run_dir = os.path.dirname(folder)
        self._done: object = None  # signature of the local folder that is mirrored completely
        self._seen = set(old)  # iterations uploaded, counted as skipped, or old
        self._damaged: set[str] = set()  # local checkpoints, by name and manifest
        self._run_yaml = b""
        self._has_aborted = False

    def step(self) -> bool:
        """Upload at most one checkpoint, then apply retention; return whether nothing is left.

        Raises:
            StoreError: the store fails. Try again.
            OtherRun: the mirror is that of another run.
            OSError: a local file cannot be read. Try again.
        """
        signature = self._signature()
        if signature == self._done:
            return True
        run_id = read_run_id(self._folder) if os.path.isdir(self._folder) else None
        if run_id is None:  # no checkpoint yet
            self._done = signature
            return True
        own = [one for one in list_own(self._folder, run_id) if self._key(one) not in self._damaged]
        there = self._place.checkpoints()
        refuse_other(there, run_id, self._place.url)
        self._write_run_file()
        missing = self._missing(own, there)
        self._note(there, missing)
        # before uploads: where these fail, as on a full disk, halves would pile up
        self._remove_halves(there, pending={one[0] for one in missing})
        if missing:
            raw = self._upload(missing[0], {stored.name: stored for stored in there})
            if raw is None:
                return False
            there = self._place.checkpoints()
            self._check_is_there(missing[0], raw, there)
            missing = missing[1:]
        self._count_skipped(own, there, missing)
        self._prune(there, newest=own[0][0] if own else -1)
        self._note(there, missing)
        if missing:
            return False
        self._done = signature
        return self._signature() == signature

    def reconnect(self, place: Place) -> None:
        """Go on with a new connection to the same place."""
        self._place = place

    def failed(self, why: str) -> None:
        """Record a failed step."""
        self.status.failed += 1
        self.status.why = why
        write_status(self._run_dir, self.status)

    def _signature(self) -> object:
        """Return a value that changes with the local checkpoints; cheap, asked every second."""
        found = []
        try:
            names = sorted(os.listdir(self._folder))
        except FileNotFoundError:
            return None
        for name in names:
            if fmt.iteration_of(name) is not None:
                try:
                    stat = os.stat(os.path.join(self._folder, name, fmt.MANIFEST_FILE))
                except FileNotFoundError:  # deleted meanwhile
                    continue
                found.append((name, stat.st_ino, stat.st_mtime_ns))
        return found

    def _missing(self, own: Own, there: list[Stored]) -> Own:
        """Return the local checkpoints that are to be uploaded, the newest first."""
        complete = {stored.iteration: stored.manifest for stored in there if not stored.why_not}
        lasting = lasting_of(own, self._keep["every"])
        return [
            one
            for place, one in enumerate(own)
            if (place == 0 or one[0] in lasting) and complete.get(one[0]) != one[2]
        ]

    def _count_skipped(self, own: Own, there: list[Stored], missing: Own) -> None:
        """Count the local checkpoints that a newer one overtook, once each."""
        complete = {stored.iteration for stored in there if not stored.why_not}
        skipped = {one[0] for one in own} - self._seen - complete - {one[0] for one in missing}
        if skipped:
            self.status.skipped += len(skipped)
            self._report({"event": "skipped", "iterations": sorted(skipped)})
        self._seen |= skipped | complete

    def _upload(
        self, one: tuple[int, str, dict[str, Any]], there: dict[str, Stored]
    ) -> bytes | None:
        """Upload a checkpoint, its manifest last; files that are there already are left.

        Returns:
            Its manifest; None if it is damaged, or was deleted before it was open.
        """
        path = one[1]
        name = os.path.basename(path)
        try:
            with _opened(path) as (raw, files):
                manifest = fmt.parse_manifest(raw, os.path.join(path, fmt.MANIFEST_FILE))
                for file, entry in manifest["files"].items():
                    fmt.check_open_file(files[file], os.path.join(path, file), entry)
                self._put(name, raw, manifest, files, before=there.get(name, Stored(name, {})))
        except (FileNotFoundError, fmt.CheckpointDamaged) as error:
            if os.path.isdir(path):
                self._damaged.add(self._key(one))
                self._report({"event": "damaged", "why": str(error)})
            return None  # else retention deleted it before it was open
        return raw

    def _check_is_there(
        self, one: tuple[int, str, dict[str, Any]], raw: bytes, there: list[Stored]
    ) -> None:
        """Check an uploaded checkpoint: another process of the run may have replaced files of it.

        With its manifest there, that process finds the other one's instead, and uploads again.
        """
        name = os.path.basename(one[1])
        if not any(
            stored.name == name and stored.raw == raw and not stored.why_not for stored in there
        ):
            raise StoreError(f"upload {name}: another process has changed it there")
        self.status.uploaded += 1
        self.status.why = ""
        self._report({"event": "uploaded", "iteration": one[0]})

    def _put(
        self,
        name: str,
        raw: bytes,
        manifest: dict[str, Any],
        files: dict[str, BinaryIO],
        *,
        before: Stored,
    ) -> None:
        """Upload the open files that differ from those there before, then the manifest."""
        entries = (before.manifest or {"files": {}})["files"]
        changed = [
            file
            for file, entry in manifest["files"].items()
            if entries.get(file) != entry or before.sizes.get(file) != entry["bytes"]
        ]
        if changed and fmt.MANIFEST_FILE in before.sizes:
            self._place.remove_file(f"{name}/{fmt.MANIFEST_FILE}")
        for file in changed:
            # this path leads to the content of a deleted file, too
            self._place.put(f"/proc/self/fd/{files[file].fileno()}", f"{name}/{file}")
        self._place.write(f"{name}/{fmt.MANIFEST_FILE}", raw)

    def _remove_halves(self, there: list[Stored], *, pending: set[int]) -> None:
        """Delete what killed processes left of their uploads."""
        with self._tolerated():
            if not self._has_aborted:
                self._place.abort_uploads()  # this process has none yet
                self._has_aborted = True
        with self._tolerated():
            for stored in there:
                if stored.is_half and stored.iteration not in pending:
                    self._place.remove(stored)

    def _prune(self, there: list[Stored], *, newest: int) -> None:
        """Delete checkpoints that the mirror no longer keeps.

        Those after `newest` neither count nor are deleted, see `retention.prune`.
        """
        own: Own = [
            (stored.iteration, stored.name, stored.manifest)
            for stored in there
            if stored.manifest is not None and stored.iteration <= newest
        ]
        lasting = lasting_of(own, self._keep["every"])
        kept = 0
        with self._tolerated():
            for stored in there:
                if stored.manifest is None or stored.iteration > newest:
                    continue  # a damaged manifest does not say whose it is
                if kept < self._keep["last"] and not stored.why_not:
                    kept += 1
                elif stored.iteration not in lasting:
                    self._place.remove(stored)

    @contextlib.contextmanager
    def _tolerated(self) -> Iterator[None]:
        """Report a failed deletion, as without the permission: uploads matter more."""
        try:
            yield
        except StoreError as error:
            self._report({"event": "kept", "why": str(error)})

    def _note(self, there: list[Stored], missing: Own) -> None:
        complete = [stored.iteration for stored in there if not stored.why_not]
        self.status.newest = max(complete, default=-1)
        self.status.pending = tuple(one[0] for one in missing)
        write_status(self._run_dir, self.status)

    def _write_run_file(self) -> None:
        """Upload the configuration, so that a start on a new disk can be compared with it."""
        try:
            data = read_file(os.path.join(self._run_dir, RUN_FILE))
        except FileNotFoundError:
            return
        if data != self._run_yaml:
            self._place.write(RUN_FILE, data)
            self._run_yaml = data

    @staticmethod
    def _key(one: tuple[int, str, dict[str, Any]]) -> str:
        return f"{os.path.basename(one[1])} {sorted(one[2]['files'].items())}"


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tuple[bytes, dict[str, BinaryIO]]]:
    """Yield the manifest and the open files of a checkpoint.

    Retention may delete it during its upload, which takes longer than the next saves where the
    store is slow: open files keep their content.

    Raises:
        FileNotFoundError: it, or a file of it, does not exist.
    """
    with contextlib.ExitStack() as opened:
        # of one folder, even if another takes its name meanwhile
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        opened.callback(os.close, folder)
        files: dict[str, BinaryIO] = {}
        for name in (fmt.MANIFEST_FILE, *fmt.FILES):
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            files[name] = opened.enter_context(open(fd, "rb"))
        yield files.pop(fmt.MANIFEST_FILE).read(fmt.MAX_MANIFEST_BYTES), files


def refuse_other(there: list[Stored], run_id: str | None, url: str) -> None:
    """Raise OtherRun if a mirror holds checkpoints of another run, or of two.

    Args:
        there: its checkpoints.
        run_id: of this run; None if it has no checkpoint yet.
        url: of the mirror.
    """
    found = {stored.manifest["run_id"] for stored in there if stored.manifest is not None}
    others = found - {run_id}
    if others if run_id is not None else len(found) > 1:
        here = f"; this run is {run_id}" if run_id is not None else ""
        raise OtherRun(
            f"{url}: holds checkpoints of another run ({', '.join(sorted(others))}){here}"
        )


def refuse_run_folder(url: str) -> None:
    """Raise OtherRun for a mirror in a run folder: it would be lost with it, or replace files."""
    scheme, _, path = url.partition("://")
    if scheme != "file":
        return
    path = os.path.realpath(path)
    while path != os.path.dirname(path):
        if all(os.path.exists(os.path.join(path, name)) for name in (CONFIG_FILE, STARTS_FILE)):
            raise OtherRun(f"{url}: expected a place outside of run folders; {path} is one")
        path = os.path.dirname(path)
