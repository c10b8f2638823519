"""The names that users write: they stay where they are."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PUBLIC = {
    "distrain": "load EventStorage get_event_storage HistoryBuffer HookBase Loss Step Trainer "
    "TrainerBase WarmupMultiStepLR WarmupCosineLR param_groups CheckpointStore resume",
    "distrain.hooks": "BestCheckpointer CallbackHook EarlyStopping EMA EvalHook GarbageCollector "
    "GpuStats Histograms IterationTimer LRScheduler PeriodicCheckpointer PeriodicWriter PreciseBN "
    "ReplicaGuard ScheduleFree StragglerWatch SWA Thaw Throughput TorchMemoryStats TorchProfiler",
    "distrain.schedule": "OneCycleLR WarmupConstantLR WarmupCosineLR WarmupCosineRestartsLR "
    "WarmupExponentialLR WarmupLinearLR WarmupMultiStepLR WarmupPolynomialLR WarmupStableDecayLR",
    "distrain.distributed": "gather_with_gradients process_group",
    "distrain.adapters": "HuggingFaceModel LightningManualStep LightningModel",
}
DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "conf").rglob("*.yaml")),
    *sorted((ROOT / "examples").rglob("*.yaml")),
]
_TARGET = re.compile(r"\b_?target_?[:=]\s*['\"]?(distrain\.[\w.]+)")


@pytest.mark.parametrize(
    ("module", "name"), [(m, name) for m, names in PUBLIC.items() for name in names.split()]
)
def test_a_public_name_is_where_it_is_documented(module, name):
    found = getattr(importlib.import_module(module), name)
    assert found.__name__ == name
    assert callable(found)


def documented_targets():
    return sorted({t for path in DOCUMENTS for t in _TARGET.findall(path.read_text())})


def test_the_documents_name_targets():
    assert len(documented_targets()) > 30


@pytest.mark.parametrize("target", documented_targets())
def test_a_documented_target_can_be_imported(target):
    module, _, name = target.rstrip(".").rpartition(".")
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("module", ["", ".checkpoint", ".weights", ".runs", ".evaluate", ".tune"])
def test_each_command_exists(module):
    command = [sys.executable, "-m", f"distrain{module}", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "usage" in result.stdout.lower() or "distrain" in result.stdout


def test_a_module_is_an_attribute_and_torch_is_not_imported():
    script = """
import sys
import distrain
assert "torch" not in sys.modules
assert distrain.distributed.process_group and distrain.adapters.HuggingFaceModel
assert not hasattr(distrain, "no_such_module") and not hasattr(distrain, "_x")
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
