"""Writer process: training waits for a copy in memory, never for a disk.

It is started by `writer_client`, shares the staging memory with the training process, and reads
requests on its standard input and answers on its standard output, one JSON object per line:

    {"reserve": bytes}          enlarge the staging memory, with its pages in place
    {"save": [offset, length]}  write the checkpoint described by the JSON text at that place of the
                                staging memory, see `_save`

When the training process dies, it finishes its requests and ends. Standard library only: it starts
in 30 ms and needs a few MB.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import select
import signal
import time
from typing import Any

from distrain.checkpoint import format as fmt
from distrain.checkpoint import retention
from distrain.checkpoint.scratch import create, lock, remove
from distrain.files.atomic import sync_folder

IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
MAX_HEADER_BYTES = 100_000_000  # the safetensors library reads no longer ones
CHUNK_BYTES = 1 << 20  # stays in the CPU cache for two hashes and the write
NICE = 10


def perform(request: dict[str, Any], staging_fd: int) -> dict[str, Any]:
    """Carry out a request; return the fields of an `Outcome`. A failure is an answer too."""
    start = time.perf_counter()
    notes: list[str] = []
    error = None
    try:
        if "reserve" in request:
            _reserve(staging_fd, request["reserve"])
        else:
            offset, length = request["save"]
            with mmap.mmap(staging_fd, 0, prot=mmap.PROT_READ) as memory:
                job = json.loads(memory[offset : offset + length])
                _save(job, memory, notes)
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}"
    return {"error": error, "notes": notes, "write_s": time.perf_counter() - start}


def _reserve(staging_fd: int, size: int) -> None:
    """Enlarge the staging memory to `size` bytes, with its pages in place."""
    if os.fstat(staging_fd).st_size < size:
        os.posix_fallocate(staging_fd, 0, size)
        mmap.mmap(staging_fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE).close()


def _save(job: dict[str, Any], memory: mmap.mmap, notes: list[str]) -> None:
    """Write and publish a checkpoint, then delete those no longer kept.

    A valid one of this run with that name stays, unless the new one has a metric's mark or score
    that it lacks.
    """
    folder = job["folder"]
    _make_folder(folder, job["parent"])
    run_id = retention.run_id_of(folder)
    path = os.path.join(folder, job["name"])
    marks = _marks(path, run_id)
    if marks is None or not _marks_of(job["manifest"]).items() <= marks.items():
        scratch = os.path.join(folder, job["scratch"])
        os.mkdir(scratch, 0o755)
        try:
            with open(create(os.path.join(scratch, fmt.MANIFEST_FILE)), "wb") as manifest:
                lock(manifest.fileno())  # until the checkpoint has its name
                fields = _write_files(scratch, job, memory)
                manifest.write(fmt.render_manifest({**fields, "run_id": run_id}))
                manifest.flush()
                os.fsync(manifest.fileno())
                sync_folder(scratch)
                if marks is None:
                    retention.set_aside(path, run_id, notes)
                else:
                    retention.step_aside(path)
                os.rename(scratch, path)
                sync_folder(folder)
        except BaseException:
            remove(scratch)
            raise
    if job["name"].endswith(fmt.TRAINED_SUFFIX):
        return
    try:
        retention.prune(folder, run_id, job["iteration"], job["keep"], notes)
    except OSError as error:
        notes.append(f"old checkpoints could not be deleted: {error}")


def _write_files(scratch: str, job: dict[str, Any], memory: mmap.mmap) -> dict[str, Any]:
    """Write and fsync all files but the manifest; return the manifest's fields without run id."""
    files: dict[str, Any] = {}
    sha256: dict[tuple[str, str], str] = {}
    with memoryview(memory) as buffer:
        for name, tensors in job["files"].items():
            files[name], hashes = _write_tensors(os.path.join(scratch, name), tensors, buffer)
            sha256.update({(name, tensor): value for tensor, value in hashes.items()})
    lines = [f"{json.dumps(part)}: {json.dumps(node)}" for part, node in job["tree"].items()]
    text = ("{\n" + ",\n".join(lines) + "\n}\n").encode()
    with open(create(os.path.join(scratch, fmt.STATE_FILE)), "wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    files[fmt.STATE_FILE] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    parts = fmt.part_digests(job["tree"], lambda file, tensor: sha256[file, tensor])
    return {"iteration": job["iteration"], **job["manifest"], "files": files, "parts": parts}


def _write_tensors(
    path: str, tensors: list[list[Any]], buffer: memoryview
) -> tuple[dict[str, Any], dict[str, str]]:
    """Write a safetensors file: length of the header (8 bytes, little-endian), header, bytes.

    Format: https://github.com/huggingface/safetensors#format

    Args:
        path: the new file.
        tensors: name, dtype, shape, offset in the buffer and size in bytes of each.
        buffer: the staging memory.

    Returns:
        The file's entry in the manifest; the sha256 of each tensor's bytes by name.

    Raises:
        ValueError: the header is too long: no program could read the file.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape, _, size in tensors:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(
            f"{os.path.basename(path)}: {len(tensors)} tensors need a header of {len(text)} bytes, "
            f"but one of more than {MAX_HEADER_BYTES} cannot be read; join small tensors, or "
            "shorten their names"
        )
    text = len(text).to_bytes(8, "little") + text
    of_file, hashes = hashlib.sha256(text), {}
    with open(create(path), "wb") as file:
        file.write(text)
        for name, _, _, offset, size in tensors:
            of_tensor = hashlib.sha256()
            for start in range(offset, offset + size, CHUNK_BYTES):
                with buffer[start : min(start + CHUNK_BYTES, offset + size)] as chunk:
                    of_tensor.update(chunk)
                    of_file.update(chunk)
                    file.write(chunk)
            hashes[name] = of_tensor.hexdigest()
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(text) + end, "sha256": of_file.hexdigest()}, hashes


def _make_folder(folder: str, parent: int | None) -> None:
    """Create the folder of the checkpoints in the run folder with inode `parent`.

    Raises:
        FileNotFoundError: the run folder was deleted or replaced. (If `parent` is None, it is
            created, too.)
    """
    around = os.path.dirname(folder)
    if parent is not None and (not os.path.isdir(around) or os.stat(around).st_ino != parent):
        raise FileNotFoundError(errno.ENOENT, "the run's folder is gone", around)
    if not os.path.isdir(folder):
        os.makedirs(folder, 0o755, exist_ok=True)
        sync_folder(around)


def _marks(path: str, run_id: str) -> dict[str, float] | None:
    """Return the marks and scores of a checkpoint; None if there is no valid one of this run."""
    try:
        manifest = fmt.verify(path)
    except fmt.CheckpointDamaged:
        return None
    # that of another run holds another state: a resumed run has passed it over
    return _marks_of(manifest) if manifest["run_id"] == run_id else None


def _marks_of(manifest: dict[str, Any]) -> dict[str, float]:
    scores = manifest.get("scores", {})
    return {**manifest["best"], **{f"scores {n}": score["value"] for n, score in scores.items()}}


def main(arguments: list[str]) -> None:
    """Answer requests until an empty line, the end of the pipe or of the training process."""
    staging_fd, parent = map(int, arguments)  # parent: process id
    for number in IGNORED_SIGNALS:  # launchers and SLURM signal all processes of a job
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED_SIGNALS)
    os.nice(NICE)
    pending = b""
    while True:
        # forked loader workers may hold the pipe open after the parent died
        while not select.select([0], [], [], 1.0)[0]:
            if os.getppid() != parent:
                return
        data = os.read(0, 1 << 16)
        if not data:
            return
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            if not line:
                return
            answer = json.dumps(perform(json.loads(line), staging_fd)) + "\n"
            try:
                os.write(1, answer.encode())
            except BrokenPipeError:
                continue  # the training process died; finish the other requests
