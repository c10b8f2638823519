"""Each private name of another library that distrain uses: that it exists, and why it is used.

After an upgrade the failing lines are the list of what to look at. A private name that is used
without a line here fails, too, and so does a line whose name is no longer used.
"""

import ast
import importlib
import inspect
from pathlib import Path

import pytest
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

ROOT = Path(__file__).parents[1]

# "module" or "module:attribute.path" -> why
NAMES = {
    "torch:_foreach_add": "LARS, LAMB: torch's own multi-tensor optimizers are built of these",
    "torch:_foreach_add_": "LARS, LAMB",
    "torch:_foreach_addcmul_": "LAMB",
    "torch:_foreach_copy_": "EMA: parameters and averages change places",
    "torch:_foreach_div": "LAMB",
    "torch:_foreach_div_": "LAMB",
    "torch:_foreach_lerp_": "EMA, LAMB",
    "torch:_foreach_mul": "LARS",
    "torch:_foreach_mul_": "clipping of sharded gradients, LARS, LAMB",
    "torch:_foreach_norm": "gradient norms without a loop over tensors",
    "torch:_foreach_sqrt_": "LAMB",
    "torch:_foreach_sub_": "LARS, LAMB",
    "torch:Tensor._is_view": "a scalar that is a view is copied, as its base may change",
    "torch.autograd.profiler:_is_profiler_enabled": "no profiler range unless a profiler runs",
    "torch.distributed.distributed_c10d:_get_default_store": "scalar names travel by the store",
    "torch.distributed.fsdp:FSDPModule._get_fsdp_state": "the root is settled before a call",
    "torch.distributed.fsdp._fully_shard._fsdp_state:"
    "FSDPState._lazy_init": "the root is settled before a call of a block",
    "torch.nn.modules._functions:SyncBatchNorm": "the CUDA kernels of SyncBatchNorm",
    "torch.nn.modules.batchnorm:_BatchNorm": "every BatchNorm, whatever its dimension",
    "torch.nn.modules.batchnorm:_LazyNormBase": "a lazy BatchNorm is converted once it has a shape",
    "torch.nn.modules.batchnorm:_NormBase": "parameter groups: a norm layer",
    "torch.nn.parallel:DistributedDataParallel._post_forward": "forward without a profiler range",
    "torch.nn.parallel:DistributedDataParallel._pre_forward": "forward without a profiler range",
    "torch.nn.parallel:DistributedDataParallel._run_ddp_forward": "forward without profiler range",
    "torch.optim:Optimizer.profile_hook_step": "recognises a step that torch has wrapped",
    "torch.optim.lr_scheduler:LRScheduler._update_lr": "overridden: SequentialLR calls it",
    "torch.optim.optimizer:_global_optimizer_post_hooks": "step without a profiler range",
    "torch.optim.optimizer:_global_optimizer_pre_hooks": "step without a profiler range",
    "torch.utils._python_dispatch:is_traceable_wrapper_subclass": "tensors that consist of others",
    "torch.utils.data._utils.collate:collate": "the default batch, its tensors in shared memory",
    "torch.utils.data._utils.collate:collate_tensor_fn": "tensors that are not collated there",
    "torch.utils.data._utils.collate:default_collate_fn_map": "the default batch of other types",
    "torch.utils.data._utils.pin_memory:pin_memory": "batches loaded in this process are pinned",
    "torch.utils.data._utils.signal_handling:_remove_worker_pids": "loader workers end unreported",
    "torch.distributed.elastic.agent.server.local_elastic_agent:"
    "LocalElasticAgent._monitor_workers": "overridden: hang detection, stop requests",
    "torch.distributed.elastic.agent.server.local_elastic_agent:"
    "LocalElasticAgent._shutdown": "overridden: ranks are killed at once",
    "hydra._internal.defaults_list:create_defaults_list": "which file set which key",
    "hydra._internal.config_loader_impl:"
    "ConfigLoaderImpl._parse_overrides_and_create_caching_repo": "all folders that are searched",
    "hydra._internal.config_loader_impl:ConfigLoaderImpl._embed_result_config": "its package",
    "torch._dynamo": "imported before the fork: DDP imports it in every rank",
    "torch._C._distributed_c10d:TCPStore": "public in torch.distributed, but not to mypy",
    "torch._C:DisableTorchFunctionSubclass": "a subclass of Tensor is saved as its plain values",
    "multiprocessing.queues:Queue._on_queue_feeder_error": "overridden: it drops a batch unsent",
    "threading:_register_atexit": "called before non-daemon threads are joined",
    "multiprocessing.popen_fork:Popen": "loader workers that SIGTERM does not end",
    "multiprocessing.context:ForkProcess._Popen": "overridden: loader workers that are killed",
    "submitit.slurm.slurm:_make_sbatch_string": "the batch script of a plan, not submitted",
    "submitit.core._submit": "the command of the batch script",
}


def _optimizer():
    return SGD(nn.Linear(1, 1).parameters(), lr=0.1)


DOCUMENTED = {"_exit", "_asdict", "_fields", "_make", "_replace"}  # public, in spite of the names

# attribute of an instance -> how to make one, why
ATTRIBUTES = {
    "_modules": (lambda: nn.Linear(1, 1), "a walk that sees names, also of shared modules"),
    "_parameters": (lambda: nn.Linear(1, 1), "a walk that sees names, also of shared tensors"),
    "_compiled_call_impl": (lambda: nn.Linear(1, 1), "whether a module is compiled"),
    "_metadata": (lambda: nn.Linear(1, 1).state_dict(), "versions of modules in a state dict"),
    "_optimizer_step_pre_hooks": (_optimizer, "step without a profiler range"),
    "_optimizer_step_post_hooks": (_optimizer, "step without a profiler range"),
    "_optimizer_load_state_dict_pre_hooks": (_optimizer, "they may reorder a saved state"),
    "_last_lr": (lambda: LambdaLR(_optimizer(), lambda t: 1.0), "get_last_lr of a schedule"),
    "_reductions": (
        lambda: importlib.import_module("torchmetrics").SumMetric(),
        "states of a metric are merged as torchmetrics does",
    ),
    "_worker_pids_set": (
        lambda: iter(DataLoader([1], num_workers=1)),
        "loader workers end unreported",
    ),
    "_workers": (lambda: iter(DataLoader([1], num_workers=1)), "loader workers are killed"),
    "_next_data": (
        lambda: iter(DataLoader([1], num_workers=1)),
        "a batch without a profiler range",
    ),
    "_shutdown_workers": (
        lambda: iter(DataLoader([1], num_workers=1)),
        "loader workers end with the loader",
    ),
}

# set where an instance cannot be made here: a line of torch's source that sets it
IN_SOURCE = {
    "_delay_all_reduce_all_params": (
        "torch.nn.parallel:DistributedDataParallel",
        "DDP with delayed parameters takes torch's own forward",
    ),
    "_opid": ("multiprocessing.queues:Queue", "a loader's items are sent without a thread"),
    "_sem": ("multiprocessing.queues:Queue", "a loader's items are sent without a thread"),
    "_reader": ("multiprocessing.queues:Queue", "polled without a selector for each batch"),
    "_poll": ("multiprocessing.queues:Queue", "replaced: it makes a selector for each batch"),
    "_pcontext": (
        "torch.distributed.elastic.agent.server.local_elastic_agent:LocalElasticAgent",
        "processes of the ranks",
    ),
    "_pc": (
        "torch.distributed.elastic.multiprocessing.api:MultiprocessContext",
        "processes of the ranks",
    ),
    "_remaining_restarts": (
        "torch.distributed.elastic.agent.server.api:SimpleElasticAgent",
        "a mistake of the user is not tried again",
    ),
}


def resolve(name):
    module, _, path = name.partition(":")
    found = importlib.import_module(module)
    for part in path.split(".") if path else ():
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_name_exists(name):
    resolve(name)


@pytest.mark.parametrize("name", [name for name, (make, _) in ATTRIBUTES.items() if make])
def test_the_attribute_exists(name):
    made = ATTRIBUTES[name][0]()
    assert hasattr(made, name)
    if hasattr(made, "_shutdown_workers"):
        made._shutdown_workers()


@pytest.mark.parametrize("name", IN_SOURCE)
def test_the_attribute_is_set_by_its_class(name):
    assert f"self.{name}" in inspect.getsource(resolve(IN_SOURCE[name][0]))


def test_overridden_methods_take_the_arguments_that_torch_gives():
    from distrain.launch.agent import _Agent

    for method in ("_monitor_workers", "_shutdown"):
        theirs = inspect.signature(getattr(_Agent.__mro__[1], method))
        ours = inspect.signature(getattr(_Agent, method))
        names = [name for name in theirs.parameters if name != "timeout"]  # torch >= 2.12
        assert [name for name in ours.parameters if name != "timeout"] == names


def test_a_wrapped_step_is_recognised():
    wrapped = Optimizer.profile_hook_step(lambda: None)
    assert SGD.step.__code__ is wrapped.__code__
    assert callable(SGD.step.__wrapped__)


def test_a_scheduler_leaves_its_wrapper_on_the_optimizer():
    optimizer = _optimizer()
    LambdaLR(optimizer, lambda t: 1.0)
    assert "step" in vars(optimizer)
    assert hasattr(optimizer.step, "_wrapped_by_lr_sched")


def _sources():
    for folder in ("distrain", "launch"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not any(parent.is_symlink() for parent in path.parents):
                yield path, ast.parse(path.read_text())


def _foreign_private_names():
    """Return {private name: place} of what is used in distrain and defined nowhere in it."""
    sources = list(_sources())
    own = set()
    for _, tree in sources:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                own.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
    found = {}
    for path, tree in sources:
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Attribute) and node.attr not in own:
                names = [node.attr]
            elif isinstance(node, ast.ImportFrom) and not node.module.startswith("distrain"):
                names = [*node.module.split("."), *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [part for alias in node.names for part in alias.name.split(".")]
            for name in names:
                if name.startswith("_") and not name.startswith("__"):
                    found.setdefault(name, f"{path.relative_to(ROOT)}:{node.lineno}")
    return found


def _listed():
    parts = {part for name in NAMES for part in name.replace(":", ".").split(".")}
    return parts | DOCUMENTED | ATTRIBUTES.keys() | IN_SOURCE.keys()


def test_every_private_name_in_use_is_listed():
    missing = {n: place for n, place in _foreign_private_names().items() if n not in _listed()}
    assert not missing, "list these in tests/test_private_api.py, each with its reason"


def test_every_listed_name_is_in_use():
    text = "\n".join(path.read_text() for path, _ in _sources())
    last = {name.replace(":", ".").split(".")[-1] for name in NAMES}
    unused = [n for n in [*last, *ATTRIBUTES, *IN_SOURCE] if n not in text]
    assert not unused, "no longer used: take them off the list"
