"""What every test leaves behind is looked at: variables, process groups, processes."""

import gc
import os
import runpy
import signal

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
if os.environ.get("TEST_CLOCK"):  # before distrain is imported; see `make test-clock`
    CLOCK = os.path.join(os.path.dirname(__file__), "clock")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [CLOCK, os.environ.get("PYTHONPATH")]))
    runpy.run_path(os.path.join(CLOCK, "sitecustomize.py"))

import psutil
import pytest
import torch.distributed as dist
from s3_server import s3_server
from stand_in import libraries  # noqa: F401 - a fixture

INSTALLING = {  # packages on a bare machine, by apt-get, which runs once at a time
    "test_tensorboard_in_browser.py",
    "test_nvml.py",
    "test_gpu_stats.py",
    "test_leases.py",
    "test_runs_gpus.py",
    "test_shared_machine.py",
}


def pytest_configure(config):
    """Hide the GPUs: these tests put many ranks on the CPU. `-m gpu` is for those on GPUs."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # under nohup SIGHUP is ignored, by the commands that tests start too; a handler ends with exec
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)


def pytest_runtest_setup():
    """Freeze the million objects of torch and its compiler: searching them takes half a second."""
    # at first, and after a job in this process, which unfreezes; counting those that are frozen
    # would search them as well
    if len(gc.get_objects(generation=2)) > 100_000:
        gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Let the processes of `-n 3` share the files: each runs whole in one of them."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            path = nodeid.split("::")[0]
            is_system = "/slurm/" in path or path.split("/")[-1] in INSTALLING
            return "system" if is_system else path

    return ByFile(config, log)


@pytest.fixture
def short_windows(monkeypatch):
    """Scalars are combined, and a stop is agreed on, after each period: not after a second."""
    monkeypatch.setattr("distrain.events.reduction._TARGET_WINDOW_S", 0.0)


@pytest.fixture(scope="module")
def s3_of_module():
    with s3_server() as server:
        yield server


@pytest.fixture
def s3(s3_of_module):
    """Return an S3 server, without faults and objects."""
    s3_of_module.clear()
    for key in s3_of_module.objects():
        s3_of_module.delete(key)
    return s3_of_module


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    """Fail a test that leaves an environment variable, a signal, a process group or a process."""
    # of pytest, torch and scikit-learn; of Python
    variables, lasting = ["PYTEST_", "TORCHINDUCTOR_", "KMP_"], ["resource_tracker"]
    if request.node.get_closest_marker("gpu"):  # torch.compile keeps its compilers
        variables, lasting = [*variables, "TRITON_"], [*lasting, "compile_worker"]
    environment = dict(os.environ)
    children = set(psutil.Process().children(recursive=True))
    signals = signal_state()
    yield
    left_signals = {n.name for n, state in signals.items() if signal_state()[n] != state}
    restore_signals(signals)
    was_initialized = dist.is_initialized()
    if was_initialized:
        dist.destroy_process_group()
    changed = {
        name
        for name in environment.keys() | os.environ.keys()
        if environment.get(name) != os.environ.get(name)
        and not name.startswith(tuple(variables))  # torch sets it when it is imported
    }
    for name in changed:
        if name in environment:
            os.environ[name] = environment[name]
        else:
            del os.environ[name]
    new = set(psutil.Process().children(recursive=True)) - children
    _, left = psutil.wait_procs(new, timeout=5.0)
    # multiprocessing's tracker of shared memory lives as long as this process
    left = [c for c in left if not any(name in " ".join(_words_of(c)) for name in lasting)]
    names = [child.name() for child in left if child.is_running()]
    for child in left:
        child.kill()
    assert not was_initialized, "the test left a process group"
    assert not changed, f"the test left environment variables changed: {sorted(changed)}"
    assert not left_signals, f"the test left signals changed: {sorted(left_signals)}"
    assert not names, f"the test left processes: {names}"


def signal_state():
    """Return the handler of each signal, and whether it is blocked: commands inherit them."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    named = {number for number in signal.valid_signals() if isinstance(number, signal.Signals)}
    # torch's loader sets a handler for good, pytest-timeout one for each test
    named -= {signal.SIGCHLD, signal.SIGALRM}
    return {number: (signal.getsignal(number), number in blocked) for number in named}


def restore_signals(before):
    """Set handlers and blocked signals as they were."""
    for number, (handler, _) in before.items():
        if signal.getsignal(number) != handler:
            signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, {n for n, (_, blocked) in before.items() if blocked})


def _words_of(process):
    try:
        return process.cmdline()
    except psutil.Error:
        return []
