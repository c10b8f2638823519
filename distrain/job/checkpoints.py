"""Checkpoints of a run: the local store, and its mirror in an object store."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import yaml

from distrain import heartbeat
from distrain.checkpoint.catalog import clear_leftovers, newest_valid
from distrain.checkpoint.mirror import Fetch, Mirror, MirrorRefused, MirrorUnreadable
from distrain.checkpoint.mirror_url import mirror_of
from distrain.checkpoint.store import CheckpointStore
from distrain.distributed.collectives import broadcast_from_main
from distrain.distributed.ranks import topology
from distrain.errors import ConfigError, ExitCode, RunFailed, RunRefused
from distrain.files.retry import unreadable
from distrain.heartbeat import Phase
from distrain.job.stop_signals import StopRequest, stop_signals
from distrain.log import logger
from distrain.process.environment import restart_count
from distrain.progress import waiting
from distrain.run_layout import CHECKPOINTS
from distrain.runfolder.allowed_changes import changed_keys, check_changes

Conf = dict[str, Any]

_STOPPED = "stopped"
_MIRROR_KEYS = ("mirror", "mirror_wait")
_QUIET_S = 2.0  # after which a wait for uploads is logged
_GRACE_S = 120.0  # of launchers without launch.grace_s
_FRACTION_OF_GRACE = 0.5  # of launch.grace_s, for uploads after a stop request
_ERRORS: dict[str, type[Exception]] = {
    each.__name__: each for each in (ConfigError, RunFailed, RunRefused)
}


def open_store(settings: Mapping[str, Any], run_dir: str) -> CheckpointStore:
    """Return the local checkpoints of a run; `settings` is `checkpoint` of its configuration."""
    own = {key: value for key, value in settings.items() if key not in _MIRROR_KEYS}
    return CheckpointStore(Path(run_dir, CHECKPOINTS), attempt=restart_count(), **own)


class RunMirror:
    """Mirror of a run's checkpoints; without `checkpoint.mirror` every method does nothing.

    In a `with`, whose end is that of the uploads.
    """

    def __init__(self, conf: Conf, run_dir: str) -> None:
        self._conf, self._run_dir = conf, run_dir
        self._url = mirror_of(conf)
        self._folder = Path(run_dir, CHECKPOINTS)
        self._mirror: Mirror | None = None
        self._stop = StopRequest()

    def __enter__(self) -> RunMirror:
        return self

    def __exit__(self, *_: object) -> None:
        if self._mirror is not None:
            self._mirror.close()
            self._mirror = None

    def fetch(self, stop: StopRequest) -> bool:
        """Make the newest valid checkpoint of the mirror a local one, if it is newer. A collective.

        Returns:
            Whether the run goes on; not if its stop was requested on rank 0 meanwhile.

        Raises:
            ConfigError: the mirror holds another run, or this run with another configuration.
            RunFailed: the mirror cannot be read, and no local checkpoint is valid.
            RunRefused: neither has a valid checkpoint, but the mirror has damaged ones.
        """
        self._stop = stop
        if self._url is None:
            return True
        pulse = heartbeat.current()
        if not topology().is_main:
            while True:
                kind, text = broadcast_from_main(None)
                pulse.beat(Phase.START)
                if kind != "wait":
                    break
        else:
            kind, text = "", ""
            try:
                with (
                    waiting("looking for checkpoints in the mirror"),
                    contextlib.closing(self._fetch(self._url)) as steps,
                ):
                    for _ in steps:
                        if stop.requested:
                            kind = _STOPPED
                            break
                        broadcast_from_main(["wait", ""])
                        pulse.beat(Phase.START)
            except tuple(_ERRORS.values()) as error:
                kind, text = type(error).__name__, str(error)
            except OSError as error:
                kind, text = RunFailed.__name__, unreadable(self._folder, error)
            broadcast_from_main([kind, text])
        if kind == _STOPPED:
            if topology().is_main:
                clear_leftovers(self._folder)
                logger.info("stopped before the first step; run it again")
            return False
        if kind:
            raise _ERRORS[kind](text)
        return True

    def _fetch(self, url: str) -> Generator[None, None, None]:
        """Fetch on rank 0; yields while it waits."""
        clear_leftovers(self._folder)
        local = newest_valid(self._folder)
        begins_anew = self._conf["resume"] == "never" and restart_count() == 0
        fetch = Fetch(url, self._folder, newer_than=-1 if local is None else local.iteration)
        try:
            yield from fetch.look()
            if begins_anew and fetch.num:
                raise ConfigError(
                    f"checkpoint.mirror={url}: expected an empty place for resume=never; it holds "
                    f"{fetch.num} checkpoints"
                )
            if not fetch.newer:
                return
            self._check_same(fetch.run_yaml, is_new=local is None)
            yield from fetch.download()
        except MirrorRefused as error:
            fix = "give another one, as checkpoint.mirror=s3://bucket/runs/${run.name}"
            raise ConfigError(f"checkpoint.mirror={error}; {fix}") from error
        except MirrorUnreadable as error:
            if local is None and not begins_anew:
                raise RunFailed(
                    f"checkpoint.mirror={url} cannot be read: {error}; nothing was changed. It may "
                    "hold checkpoints: run it again when it can be read; with another "
                    "checkpoint.mirror, or null, the run begins at 0"
                ) from error
            start = f"continues from local iteration {local.iteration}" if local else "begins at 0"
            logger.warning("checkpoint.mirror=%s cannot be read: %s; the run %s", url, error, start)
            return
        finally:
            fetch.close()
        if fetch.name:
            logger.info("fetched %s from %s", fetch.name, url)
        elif local is None and fetch.num:
            raise RunRefused(
                f"checkpoint.mirror={url}: none of {fetch.num} checkpoints is valid; begin another "
                "run with run.name=... and another checkpoint.mirror"
            )

    def _check_same(self, run_yaml: str, *, is_new: bool) -> None:
        """Check that the mirrored run has this configuration, and this name on a new disk."""
        try:
            frozen = yaml.safe_load(run_yaml)
        except yaml.YAMLError:
            frozen = None
        if not isinstance(frozen, dict):
            return  # a checkpoint that does not fit is refused when it is loaded
        place, name = f"checkpoint.mirror={self._url}", self._conf["run"]["name"]
        run = frozen.get("run")
        its_name = run.get("name") if isinstance(run, dict) else None
        if is_new and its_name != name:
            raise ConfigError(
                f"{place}: expected an empty place, or one of the run {name}; it holds the run "
                f"{its_name}: run.name={its_name} continues that"
            )
        changed = changed_keys(frozen, self._conf)
        for notice in check_changes(place, changed, self._conf.get("allow_changes", ())):
            logger.info("%s", notice)

    def start(self) -> None:
        """Start the uploads, on rank 0."""
        if self._url is None or not topology().is_main:
            return
        if self._url.startswith("memory:"):
            logger.warning("checkpoint.mirror=%s ends with its process: for trials only", self._url)
        settings = self._conf["checkpoint"]
        keep = {"last": settings["keep_last"], "every": settings["keep_every"]}
        self._mirror = Mirror(self._url, self._folder, keep=keep)

    def finish(self, outcome: ExitCode) -> None:
        """Wait for the uploads, on rank 0, at most `checkpoint.mirror_wait`; report what is left.

        A run that was asked to stop waits until half of `launch.grace_s` is over, as the ranks are
        killed after that; with `launch.nice` not at all, as another run waits for its GPUs. A
        request during the wait ends it.
        """
        if self._mirror is None:
            return
        mirror, pulse = self._mirror, heartbeat.current()
        begun, is_told = time.monotonic(), False
        wait_s = float(self._conf["checkpoint"]["mirror_wait"])
        # the last save may have taken some of the time
        asked = self._stop.since or (begun if outcome is ExitCode.STOPPED else None)
        if asked is not None:
            wait_s = min(wait_s, asked + self._stopped_s() - begun)
        with stop_signals() as stop, waiting("uploading checkpoints to the mirror"):

            def is_over() -> bool:
                nonlocal is_told
                pulse.beat(Phase.END)
                waited_s = time.monotonic() - begun
                if waited_s > _QUIET_S and not is_told:
                    is_told = True
                    logger.info("waiting for uploads, checkpoint.mirror_wait=%.0f s", wait_s)
                return waited_s >= wait_s or (stop.requested and asked is None)

            is_done = mirror.finish(is_over)
        counts = f"{mirror.uploaded} uploads, {mirror.skipped} skipped, {mirror.failed} failures"
        if is_done:
            logger.info("checkpoints are in %s (%s)", self._url, counts)
        else:
            logger.warning(
                "checkpoint.mirror=%s: checkpoints are missing there (%s): %s; they are in %s%s",
                self._url,
                counts,
                mirror.why or "the upload did not end in time",
                self._folder,
                "" if mirror.is_refused else ", and the same command uploads them",
            )

    def _stopped_s(self) -> float:
        """Return the time from a stop request to the end of the wait for uploads."""
        launch = self._conf.get("launch") or {}
        if launch.get("nice"):
            return 0.0
        return _FRACTION_OF_GRACE * float(launch.get("grace_s") or _GRACE_S)
