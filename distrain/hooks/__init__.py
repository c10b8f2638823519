"""Hooks that come with distrain, one per file."""

from distrain.hooks.callback import CallbackHook
from distrain.hooks.checkpoint import BestCheckpointer, PeriodicCheckpointer
from distrain.hooks.early_stopping import EarlyStopping
from distrain.hooks.ema import EMA
from distrain.hooks.evaluation import EvalHook
from distrain.hooks.garbage import GarbageCollector
from distrain.hooks.gpu.hook import GpuStats
from distrain.hooks.histograms import Histograms
from distrain.hooks.memory import TorchMemoryStats
from distrain.hooks.precise_bn import PreciseBN
from distrain.hooks.profiler import TorchProfiler
from distrain.hooks.replica_guard import ReplicaGuard
from distrain.hooks.schedule import LRScheduler
from distrain.hooks.schedule_free import ScheduleFree
from distrain.hooks.stop_at import StopAt
from distrain.hooks.straggler import StragglerWatch
from distrain.hooks.swa import SWA
from distrain.hooks.thaw import Thaw
from distrain.hooks.throughput import Throughput
from distrain.hooks.timer import IterationTimer
from distrain.hooks.writer import PeriodicWriter

__all__ = [
    "EMA",
    "SWA",
    "BestCheckpointer",
    "CallbackHook",
    "EarlyStopping",
    "EvalHook",
    "GarbageCollector",
    "GpuStats",
    "Histograms",
    "IterationTimer",
    "LRScheduler",
    "PeriodicCheckpointer",
    "PeriodicWriter",
    "PreciseBN",
    "ReplicaGuard",
    "ScheduleFree",
    "StopAt",
    "StragglerWatch",
    "Thaw",
    "Throughput",
    "TorchMemoryStats",
    "TorchProfiler",
]
