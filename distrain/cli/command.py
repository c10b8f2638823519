"""Command line: compose the configuration, claim the run folder, start the job by its launcher.

No torch is imported here: help, errors and submissions stay fast.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from distrain.checkpoint.mirror_url import mirror_of
from distrain.checks import wrong
from distrain.cli import completion
from distrain.cli.sweep import check_objective, objective_of, sweep_name, worst
from distrain.config.compose import explain, resolve
from distrain.config.import_path import import_from_here
from distrain.config.instantiate import build_as
from distrain.config.keys import InitKeys
from distrain.config.origins import clean
from distrain.config.overrides import readable
from distrain.errors import ConfigError, ExitCode, NonFiniteLoss, RankFailed, RunFailed, exit_code
from distrain.files.temp_folder import folder_of_processes
from distrain.launch import Launcher, stop
from distrain.launch.stop import StopRequest
from distrain.process import stdio
from distrain.process.environment import environment
from distrain.process.threads import limit_exit
from distrain.redact import masked_text, secrets_of
from distrain.runfolder.folder import RunFolder, await_run

if TYPE_CHECKING:
    from distrain.job.job import TrainJob

_FULL_ERROR = "HYDRA_FULL_ERROR"
_CONFIG_PATH = ("--config-path", "-cp")
_WITH_VALUE = (
    *_CONFIG_PATH,
    *("--config-name", "-cn", "--config-dir", "-cd", "--cfg", "-c", "--package", "-p"),
    "--experimental-rerun",
)
_INFO = ("--info", "-i")
_KINDS_OF_INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


class Command:
    """One command, with one run or those of a sweep.

    Args:
        argvs: the arguments; of several, each has one run, and those are submitted together.
        is_last: the process ends after `run`: signals remain requests to stop after it, so that
            none of them changes the exit code.

    Attributes:
        codes: exit codes of the runs, in their order.
        crash: an unexpected exception (a bug in distrain).
    """

    def __init__(self, *argvs: Sequence[str], is_last: bool = False) -> None:
        self.codes: list[ExitCode] = []
        self.crash: Exception | None = None
        self._argvs = argvs
        self._argv: Sequence[str] = ()  # of the run that starts
        self._secrets = secrets_of([each for argv in argvs for each in argv])
        self._is_last = is_last
        self._stop = StopRequest(is_quiet=True)  # around and between the runs
        self._wants_trace = os.environ.get(_FULL_ERROR) == "1"
        self._job: TrainJob | None = None  # of the run that was started last
        self._submissions: list[tuple[Launcher, TrainJob]] = []
        self._open = contextlib.ExitStack()  # run folders of the submissions

    def run(self) -> ExitCode:
        """Run the command; return the most severe exit code of its runs."""
        for argv in self._argvs:
            self._compose(argv)
        with self._open:
            self._submit()
        if not self._is_last:
            self._stop.__exit__(None, None, None)
        if self.crash is not None:
            raise self.crash
        return worst(self.codes)

    def _compose(self, argv: Sequence[str]) -> None:
        """Let Hydra read the arguments, and start the run, or those of the sweep."""
        self._argv = sys.argv[1:] = list(argv)
        try:
            # with this variable Hydra raises exceptions instead of exiting
            with environment({_FULL_ERROR: "1"}), folder_of_processes() as scratch:
                OmegaConf.register_new_resolver("distrain_scratch", lambda: scratch, replace=True)
                start = hydra.main(
                    config_path="pkg://distrain.conf", config_name="main", version_base="1.3"
                )
                start(lambda cfg: self._one(cfg))()
        except Exception as error:
            self.codes.append(self._report_error(explain(error), error))

    def _one(self, cfg: DictConfig) -> float | None:
        """Start one run; catch its exceptions, so that a sweep goes on.

        Returns:
            The objective of the run, where a sweeper asks for one (see `sweep.objective_of`).
        """
        self._job = None
        self._start_caught(cfg)
        return objective_of(self._job, self.codes[-1] if self.codes else ExitCode.FAILED)

    def _start_caught(self, cfg: DictConfig) -> None:
        """Start one run; record its exit code, and its exception."""
        if ExitCode.STOPPED in self.codes or self._stop.since is not None:
            self.codes.append(ExitCode.STOPPED)  # a stop ends the whole sweep
            return
        try:
            cfg = clean(cfg, HydraConfig.get())
            self.codes.append(self._start(cfg))
        except (ConfigError, RankFailed, NonFiniteLoss, RunFailed) as error:
            self.codes.append(self._report_error(error, error))
        except Exception as error:
            if self.crash is not None:
                traceback.print_exception(self.crash)
            self.crash = error

    def _start(self, cfg: DictConfig) -> ExitCode:
        """Start the run of a composed configuration."""
        from distrain.job.job import TrainJob

        conf = resolve(cfg)
        self._secrets |= secrets_of((), conf)
        expected = "a subclass of distrain.launch.Launcher"
        launcher = build_as(Launcher, conf["launch"], "launch", expected)
        handover = None if conf["plan"] else launcher.handover
        if handover is not None and not launcher.owns_run:
            message = handover.receive()
            if "code" in message:  # nothing to start: rank 0 reports the reason
                return ExitCode(message["code"])
            # `${now:}` differs between processes: resolve again with the name of rank 0
            cfg.run.name, cfg.run.dir = message["name"], message["dir"]
            conf = resolve(cfg)
        place = {"name": conf["run"]["name"], "dir": os.path.abspath(conf["run"]["dir"])}
        name = sweep_name(HydraConfig.get(), self._argv)
        if name:
            conf["run"]["dir"] = os.path.join(conf["run"]["dir"], name)
            if mirror := mirror_of(conf):
                conf["checkpoint"]["mirror"] = f"{mirror}/{name}"
        if weights := conf["init"]["weights"]:
            conf["init"]["weights"] = os.path.abspath(weights)
        self._job = job = TrainJob(conf, os.path.abspath(conf["run"]["dir"]))
        check_objective(conf, HydraConfig.get(), waits=launcher.waits)
        if conf["plan"]:
            print(job.plan())
            if text := launcher.plan(job):
                print(text)
            return ExitCode.FINISHED
        if not launcher.owns_run:
            await_run(job.run_dir)
            self._stop.__enter__()
            with _storage_of(job):
                return ExitCode(launcher.start(job))
        if handover is None:
            return self._start_own(launcher, job, name)
        code = ExitCode.FAILED
        try:
            code = self._start_own(launcher, job, name, on_claim=lambda: handover.send(place))
        except ConfigError:
            code = ExitCode.BAD_CONFIG
            raise
        finally:  # ignored if the place was sent
            handover.send({"code": int(code)}, is_last=True)
        return code

    def _start_own(
        self,
        launcher: Launcher,
        job: TrainJob,
        name: str,
        *,
        on_claim: Callable[[], None] | None = None,
    ) -> ExitCode:
        """Start a run whose folder is written by this process; `name` is its name in a sweep.

        `on_claim` is called after the folder is claimed, if iterations are left.
        """
        conf = job.conf
        is_one_of_many = bool(name) or len(self._argvs) > 1
        folder = RunFolder(job.run_dir)
        with contextlib.ExitStack() as opened:
            opened.enter_context(folder)
            folder.freeze(
                conf,
                self._argv,
                overrides=_own_overrides(),
                is_restart=launcher.is_restart,
            )
            if folder.is_new:  # a resumed run has its own weights
                _check_init(conf["init"])
            for notice in [f"run {folder.path}"] * is_one_of_many + folder.notices:
                print(f"distrain: {notice}", file=sys.stderr)
            if folder.done_iter is not None:
                done = f"all {folder.done_iter} iterations are done"
                print(f"{folder.path}: {done}; trainer.max_iter=... extends the run")
                return ExitCode.FINISHED
            if is_one_of_many and not launcher.waits:
                self._submissions.append((launcher, job))
                self._open.push(opened.pop_all())
                return ExitCode.FINISHED
            if not launcher.waits:  # the run continues, and its end is recorded, without us
                return ExitCode(launcher.start(job))
            if on_claim is not None:
                on_claim()
            self._stop.__enter__()
            with _storage_of(job):
                return folder.watch(lambda: launcher.start(job))

    def _submit(self) -> None:
        """Start the runs of a sweep by a launcher that does not wait for them."""
        if not self._submissions:
            return
        launchers, jobs = zip(*self._submissions, strict=True)
        try:
            self.codes.append(launchers[0].start_all(jobs))
        except (ConfigError, RankFailed, NonFiniteLoss, RunFailed) as error:
            self.codes.append(self._report_error(error, error))

    def _report_error(self, explained: Exception, error: Exception) -> ExitCode:
        """Print an error as one line, with the traceback on request; return its exit code."""
        if self._wants_trace:
            traceback.print_exception(error)
        print(
            f"distrain: {masked_text(str(explained), self._secrets)}", file=sys.stderr, flush=True
        )
        return exit_code(explained)


def _own_overrides() -> list[str]:
    """Return the overrides of this run as written: `${oc.env:NAME}` and `${vars.x}` stay."""
    given: Any = OmegaConf.to_container(HydraConfig.get().overrides, resolve=False)
    return list(given["task"])


def _check_init(init: dict[str, Any]) -> None:
    """Check that the initial weights exist, and that no key is set that needs them without."""
    weights, defaults = init["weights"], dataclasses.asdict(InitKeys())
    if weights and not os.path.exists(weights):
        raise ConfigError(f"init.weights={weights}: there is no such file or folder")
    for key, value in init.items():
        if not weights and value != defaults[key]:
            raise wrong(f"init.{key}", value, f"init.weights=PATH with it, or no init.{key}")


@contextlib.contextmanager
def _storage_of(job: TrainJob) -> Iterator[None]:
    """Report an OSError of a file in the run folder as RunFailed: it is not a bug."""
    try:
        yield
    except OSError as error:
        if not str(error.filename).startswith(job.run_dir):
            raise
        raise RunFailed(f"{error.filename}: {error.strerror}") from error


def main(*argvs: Sequence[str]) -> None:
    """Run the command line, or a `Command` of several; exit with its code."""
    stdio.protect()
    os.umask(os.umask(0o077) | 0o002)  # a user who can write to a run folder can run code in it
    import_from_here()
    read = [readable(from_here(argv)) for argv in argvs or [sys.argv[1:]]]
    script = completion.script(read[0])
    if script is not None:
        print(script, end="")
        return
    try:
        code = int(Command(*read, is_last=True).run())
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    stop.ignore()
    limit_exit(code)
    sys.exit(code)


def from_here(argv: Sequence[str]) -> list[str]:
    """Return the arguments with all flags first, and an absolute `--config-path`.

    Hydra resolves the path relative to this module, and refuses overrides on both sides of a flag.
    """
    flags: list[str] = []
    overrides: list[str] = []
    for argument in argv:
        flag, equals, value = argument.partition("=")
        if flags and flags[-1] in _WITH_VALUE:
            flags.append(_absolute(argument) if flags[-1] in _CONFIG_PATH else argument)
        elif flags and flags[-1] in _INFO and argument in _KINDS_OF_INFO:
            flags.append(argument)
        elif equals and flag in _CONFIG_PATH:
            flags.append(f"{flag}={_absolute(value)}")
        else:
            (flags if argument.startswith("-") else overrides).append(argument)
    return flags + overrides


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(path)
