"""ResNet-50 and a GPT of 124 M parameters on CUDA: a bare loop and ours take turns.

    python -m benchmarks.gpu                                            # one device
    torchrun --standalone --nproc-per-node=8 -m benchmarks.gpu          # eight of them

For each model: samples a second and time of a step of both, the share of the card's peak that the
arithmetic makes (MFU), and a proof that an ordinary step of ours waits for nothing: torch raises at
every operation that synchronises the host with the device. On one device also what training feels
of a checkpoint.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

from benchmarks.checkpoint import Saves, largest_mb, plain_copies_ms, print_saves
from benchmarks.common import Turns, estimate, percentile, print_table
from benchmarks.models import GPT, resnet50
from benchmarks.ours import default_hooks
from distrain import HookBase, Trainer
from distrain.checkpoint.store import CheckpointStore
from distrain.distributed.ranks import Topology, local_device, process_group
from distrain.optim.optimizer import build_optimizer

# dense bf16 operations a second, from NVIDIA's data sheets; the first name that fits counts
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
}
WARM_UP_STEPS = 25  # before synchronisation is forbidden: names are learnt, memory is cached


class Case(NamedTuple):
    """One model with its batches."""

    name: str
    unit: str
    build: Callable[[], nn.Module]
    new_batch: Callable[[torch.device], tuple[Tensor, Tensor]]
    per_batch: int  # samples or tokens of one rank's batch
    flops: float  # of one forward and backward over one of them
    save_period: int  # steps from one checkpoint to the next, in which it is written
    channels_last: bool
    compile: bool


def resnet_case(batch_size: int) -> Case:
    """Return ResNet-50: a forward of 224x224 is 4.09 G multiply-adds, a backward two forwards.

    He et al. 2015 count 3.8 G, for a net with its strides in the 1x1 convolutions.
    """

    def new_batch(device: torch.device) -> tuple[Tensor, Tensor]:
        images = torch.randn(batch_size, 3, 224, 224, device=device)
        labels = torch.randint(1000, (batch_size,), device=device)
        return images.contiguous(memory_format=torch.channels_last), labels

    return Case(
        name="ResNet-50, bf16, channels_last",
        unit="images",
        build=resnet50,
        new_batch=new_batch,
        per_batch=batch_size,
        flops=3 * 2 * 4.09e9,
        save_period=60,
        channels_last=True,
        compile=False,
    )


def gpt_case(batch_size: int, *, length: int = 1024) -> Case:
    """Return the GPT: 6 N + 12 L T D operations a token (Chowdhery et al. 2022, appendix B)."""

    def new_batch(device: torch.device) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(50304, (batch_size, length + 1), device=device)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    return Case(
        name="GPT 124 M, bf16, compile",
        unit="tokens",
        build=GPT,
        new_batch=new_batch,
        per_batch=batch_size * length,
        flops=6 * 124e6 + 12 * 12 * length * 768,
        save_period=250,
        channels_last=False,
        compile=True,
    )


class ForbidsSynchronisation(HookBase):
    """From a certain step on, makes torch raise where the host would wait for the device."""

    order = 0

    def before_step(self) -> None:
        if self.trainer.iter == self.trainer.start_iter + WARM_UP_STEPS:
            torch.cuda.set_sync_debug_mode("error")

    def after_step(self) -> None:
        if self.trainer.iter_done == self.trainer.max_iter:  # what is under way is waited for
            torch.cuda.set_sync_debug_mode("default")


def bare_loop(
    case: Case, where: Topology, device: torch.device, folder: Path
) -> Callable[[Iterable[Any]], None]:
    """Return a function that trains on some batches with DDP, bf16 and nothing else."""
    model = case.build().to(device)
    if case.channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = new_optimizer(model)
    if case.compile:
        model.compile()
    called = (
        DistributedDataParallel(model, device_ids=[device], gradient_as_bucket_view=True)
        if where.world_size > 1
        else model
    )
    writer, step = SummaryWriter(str(folder)) if where.is_main else None, 0

    def train(batches: Iterable[Any]) -> None:
        nonlocal step
        for batch in batches:
            with torch.autocast("cuda", torch.bfloat16):
                loss = called(*batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if writer and step % 20 == 0:
                writer.add_scalar("loss", loss.item(), step)

    return train


def new_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Return the same for both."""
    return build_optimizer(
        model, target="torch.optim.AdamW", lr=1e-4, weight_decay=0.1, weight_decay_norm=0.0
    )


def new_trainer(
    case: Case, data: Iterable[Any], device: torch.device, folder: Path, *extra: HookBase
) -> Trainer:
    """Return our trainer with all default hooks and writers."""
    model = case.build().to(device)
    optimizer = new_optimizer(model)
    hooks = default_hooks(optimizer, folder) | {f"extra_{n}": hook for n, hook in enumerate(extra)}
    return Trainer(
        model,
        optimizer,
        data,
        hooks=hooks,
        precision="bf16",
        channels_last=case.channels_last,
        compile=case.compile,
    )


def proves_it_would_raise(device: torch.device) -> None:
    """Check that torch notices a synchronisation at all.

    Raises:
        AssertionError: it does not.
    """
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.ones((), device=device).item()
    except RuntimeError:
        return
    finally:
        torch.cuda.set_sync_debug_mode("default")
    raise AssertionError("an .item() passed unnoticed, so the proof below would prove nothing")


def prove_no_synchronisation(case: Case, device: torch.device, folder: Path, *, steps: int) -> None:
    """Train with synchronisation forbidden; RuntimeError with the place if there is one."""
    proves_it_would_raise(device)
    batch = case.new_batch(device)
    trainer = new_trainer(case, itertools.repeat(batch), device, folder, ForbidsSynchronisation())
    trainer.train(0, WARM_UP_STEPS + steps)


def measure(
    case: Case, where: Topology, device: torch.device, folder: Path, *, max_s: float
) -> Turns:
    """Let bare and ours take turns."""
    batches = [case.new_batch(device) for _ in range(4)]
    bare = bare_loop(case, where, device, folder / "bare")
    # a block takes a second or more
    turns = Turns(batches, bare, block=40, blocks=1, max_s=max_s, settle=torch.cuda.synchronize)
    gc.collect()
    gc.freeze()
    new_trainer(case, turns, device, folder).train(0, 10**9)
    return turns


def measure_saves(case: Case, device: torch.device, folder: Path, *, saves: int = 4) -> None:
    """Train with some checkpoints, each step waited for, and print what they took."""
    settle, period = torch.cuda.synchronize, case.save_period
    checkpoints = folder / "saved"
    hook = Saves(CheckpointStore(checkpoints, keep_last=2), period=period, settle=settle)
    trainer = new_trainer(case, itertools.repeat(case.new_batch(device)), device, folder, hook)
    gc.collect()
    gc.freeze()
    trainer.train(0, period * (saves + 1) - 1)
    size_mb = largest_mb(checkpoints)
    copies_ms = plain_copies_ms(trainer, rounds=saves, settle=settle)
    print_saves(f"{case.name}: a checkpoint of {size_mb:,.0f} MB", hook, copies_ms)


def rows_of(case: Case, turns: Turns, where: Topology, peak: float) -> Iterator[list[object]]:
    """Yield the rows of a case: bare and ours."""
    ratio = estimate(r.ours.wall_s / r.bare.wall_s for r in turns.rounds)
    over = estimate(r.over_us for r in turns.rounds)
    for name in ("bare", "ours"):
        step_s = estimate(getattr(r, name).wall_s for r in turns.rounds)
        steps_s = turns.bare_steps_s if name == "bare" else turns.our_steps_s
        per_s = case.per_batch * where.world_size / step_s.median
        mfu = case.flops * case.per_batch / step_s.median / peak if peak else float("nan")
        yield [
            case.name,
            name,
            f"{per_s:,.0f} {case.unit}/s",
            f"{estimate(getattr(r, name).wall_s * 1e3 for r in turns.rounds):.2f}",
            f"{percentile(steps_s, 99) * 1e3:.2f}",
            f"{mfu:.1%}",
            f"{ratio:.4f}; {over:.0f} us CPU more" if name == "ours" else "",
            len(turns.rounds),
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=256, help="a rank's batch for ResNet-50")
    parser.add_argument("--texts", type=int, default=16, help="a rank's batch for the GPT")
    parser.add_argument("--max-s", type=float, default=60, help="for each model")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu: no CUDA device here, nothing was run")
        return
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    torch.set_float32_matmul_precision("high")
    with process_group() as where, tempfile.TemporaryDirectory() as name:
        device = local_device()
        card = torch.cuda.get_device_name(device)
        peak = next((flops for part, flops in PEAK_FLOPS.items() if part in card), 0.0)
        for number, case in enumerate((resnet_case(options.images), gpt_case(options.texts))):
            folder = Path(name, str(number))
            prove_no_synchronisation(case, device, folder / "proof", steps=100)
            if where.is_main:
                print(f"{case.name}: 100 steps of ours without one synchronisation")
            torch.cuda.empty_cache()
            turns = measure(case, where, device, folder, max_s=options.max_s)
            if where.is_main:
                print_table(
                    f"{where.world_size} x {card}, torch {torch.__version__}, 95 %",
                    ["model", "loop", "speed", "ms a step", "p99 ms", "MFU", "over bare", "rounds"],
                    rows_of(case, turns, where, peak),
                )
            if where.world_size == 1:
                measure_saves(case, device, folder / "saves")
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
