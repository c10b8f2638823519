"""TrainerBase: the loop over iterations, its hooks, and the reduction of scalars."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from functools import cached_property
from typing import Any

from distrain import heartbeat
from distrain.checks import whole, wrong
from distrain.distributed.ranks import default_store, new_cpu_group, topology
from distrain.durations import seconds, whole_iterations
from distrain.errors import ConfigError
from distrain.events.reduction import STOP_EARLY, STOP_REQUESTED, ScalarReduction
from distrain.events.storage import EventStorage
from distrain.heartbeat import ObservedHeartbeat, Phase, Pulse
from distrain.log import logger
from distrain.trainer.hook import MOMENTS, STEP_MOMENTS, HookBase, Moment, check_moments
from distrain.trainer.time_limit import time_limit


class TrainerBase:
    """A loop over iterations with hooks; subclasses define the step.

    Args:
        hooks: by name, or a list, named after their classes then. The name is the key of a hook's
            state in checkpoints.
        window: iterations per row of the writers. Scalars are reduced over ranks once per window,
            or, where windows take less than a second, once in several of them.
        stop_on_nonfinite: end training on all ranks when a loss is not finite on any.
        max_time: of `train`, in seconds or as "2h30m"; then it stops as after `request_stop`.

    Attributes:
        iter: the current iteration; after training, the number of iterations done.
        iter_done: the number of iterations whose step is done.
        start_iter: the first iteration of this run.
        max_iter: one past the last.
        is_in_epochs: whether it was given in epochs.
        storage: the EventStorage of this run.
        reduction: reduces its scalars over ranks.
        error: exception that ended training, else None.
        ends_only: whether an earlier start has done all iterations, and only `after_train` is left.
        where: topology of this process among the ranks.
        pulse: heartbeat of this rank, which the watchdog reads.
        settings: plain values that are saved with each state, empty for none.
    """

    storage: EventStorage
    reduction: ScalarReduction
    is_sharded = False  # then `state_dict` is a collective

    def __init__(
        self,
        hooks: Mapping[str, HookBase] | Iterable[HookBase] = (),
        *,
        window: int = 20,
        stop_on_nonfinite: bool = True,
        max_time: str | float | None = None,
    ) -> None:
        self.iter = self.iter_done = self.start_iter = self.max_iter = 0
        self.window = whole("trainer.window", window, least=1)
        self.error: BaseException | None = None
        self.where = topology()
        self.pulse: Pulse = heartbeat.current()
        self.hooks: dict[str, HookBase] = {}
        self._stop_on_nonfinite = stop_on_nonfinite
        self._max_time_s = None if max_time is None else seconds("trainer.max_time", max_time)
        self._stop_requested = False
        self.settings: Mapping[str, Any] = {}
        self._histories: Mapping[str, Any] = {}
        self._early_stop = False  # of the loaded state
        self.ends_only = self.is_in_epochs = False
        self._end_left: Mapping[str, int] | None = None  # how training ended, by the loaded state
        self._reported: dict[str, tuple[int, float]] = {}  # metrics: iter_done, value
        self._calls: dict[Moment, list[Callable[[], None]]] = {moment: [] for moment in MOMENTS}
        self.register_hooks(hooks)

    def register_hooks(self, hooks: Mapping[str, HookBase] | Iterable[HookBase]) -> None:
        """Add hooks, by name or in a list; all are sorted by `HookBase.order`.

        Raises:
            ValueError: a name is taken.
            ConfigError: a method of a hook has almost the name of a moment.
        """
        if not isinstance(hooks, Mapping):
            named: dict[str, HookBase] = {}
            for hook in hooks:
                name = kind = type(hook).__name__
                for number in itertools.count(2):
                    if name not in named and name not in self.hooks:
                        break
                    name = f"{kind}_{number}"
                named[name] = hook
            hooks = named
        for name, hook in hooks.items():
            check_moments(type(hook))
            if name in self.hooks:
                raise ValueError(f"hook {name!r}: expected a name that is not taken")
            hook.trainer = self
            self.hooks[name] = hook
        self.hooks = dict(sorted(self.hooks.items(), key=lambda item: item[1].order))
        self._order_calls(*MOMENTS)

    def name_of(self, hook: HookBase) -> str:
        """Return the name of a registered hook."""
        return next(name for name, each in self.hooks.items() if each is hook)

    def _order_calls(self, *moments: Moment) -> None:
        for moment in moments:
            ordered = list(self.hooks.values())
            if moment == "after_train":
                ordered.sort(key=lambda h: h.order if h.order_at_end is None else h.order_at_end)
            self._calls[moment] = [
                getattr(hook, moment)
                for hook in ordered
                if getattr(type(hook), moment) is not getattr(HookBase, moment)
                and (hook.ranks == "all" or self.where.is_main)
                and not (hook.is_idle and moment in STEP_MOMENTS)
            ]

    def train(self, start_iter: int, max_iter: int | str) -> None:
        """Train from iteration `start_iter` up to, not including, `max_iter`.

        Args:
            start_iter: 0, or the number of iterations that the loaded state has done.
            max_iter: number of iterations at the end; or text in epochs, as "3 epochs", rounded up
                to a whole iteration.

        Raises:
            ConfigError: in epochs, but the length of the data is unknown.
            NonFiniteLoss: a loss was not finite on some rank; on all ranks at one iteration.
        """
        max_iter = self._in_iterations(max_iter)
        if not 0 <= start_iter <= max_iter:
            raise ConfigError(
                f"start_iter={start_iter}: expected at least 0, and at most max_iter={max_iter}"
            )
        self.iter = self.iter_done = self.start_iter = start_iter
        self.max_iter = max_iter
        self.error = None
        stopped_early = self._end_left is not None and self._end_left["stop"] == STOP_EARLY
        self.ends_only = self._end_left is not None and (stopped_early or start_iter == max_iter)
        # scalars put at the end belong to the last iteration
        first_iter = start_iter - 1 if self.ends_only else start_iter
        with EventStorage(first_iter) as self.storage:
            self.storage.load_state_dict(self._histories)
            # At the end of a window the early stop was obeyed: this start asks for more iterations.
            is_obeyed = start_iter % self.window == 0 and not stopped_early
            self.storage.early_stop = self._early_stop and not is_obeyed
            self.reduction = ScalarReduction(
                self.storage,
                period=self.window,
                first_iter=first_iter,
                rank=self.where.rank,
                world_size=self.where.world_size,
                group=new_cpu_group(),
                store=default_store(),
                stop_on_nonfinite=self._stop_on_nonfinite,
            )
            if self._stop_requested:
                self.request_stop()
            if stopped_early:
                self.reduction.stop = STOP_EARLY
            try:
                self.prepare()
                self._call("before_train")
                self._order_calls(*STEP_MOMENTS)  # without the hooks that are idle
                if not self.ends_only:
                    self._loop()
                self._beat_end()
                self.reduction.drain(self.storage.iter)
                self._call("after_last_step")
            except BaseException as error:
                self.error = error
                self._beat_end()
                raise
            finally:
                self._end()

    def _in_iterations(self, max_iter: int | str) -> int:
        self.is_in_epochs = isinstance(max_iter, str)
        if isinstance(max_iter, int):
            return max_iter
        return whole_iterations("max_iter", max_iter, iters_per_epoch=self.iters_per_epoch)

    def _loop(self) -> None:
        before_step, after_step = self._calls["before_step"], self._calls["after_step"]
        storage, reduction, pulse = self.storage, self.reduction, self.pulse
        if self._max_time_s is not None and self.where.is_main:
            after_step = [*after_step, time_limit(reduction, self._max_time_s)]
        data, hooks = Phase.DATA, Phase.HOOKS
        for iteration in range(self.start_iter, self.max_iter):
            self.iter = storage.iter = pulse.iteration = iteration
            pulse.beat(data)
            for call in before_step:
                call()
            self.run_step()
            pulse.beat(hooks)
            self.iter_done = iteration + 1
            reduction.advance(iteration)
            for call in after_step:
                call()
            reduction.close_if_due(iteration)
            if reduction.stop:
                break
        self.iter = self.iter_done

    def _end(self) -> None:
        """Call each hook's `after_train`, even if one fails; raise the first error."""
        failed = self.error is not None
        for call in self._calls["after_train"]:
            try:
                call()
            except Exception as error:  # not KeyboardInterrupt, which ends at once
                if self.error is None:
                    self.error = error
                else:
                    logger.warning("after the failure, a hook failed too", exc_info=True)
        if self.error is not None and not failed:
            raise self.error

    def _beat_end(self) -> None:
        self.pulse.iteration = self.iter_done
        self.pulse.beat(Phase.END)

    @cached_property
    def iters_per_epoch(self) -> Fraction | None:
        """Iterations per pass over the data, exactly; None if unknown. A collective at first."""
        return None

    def prepare(self) -> None:
        """Prepare for the first step; called before any hook."""

    def run_step(self) -> None:
        """Do one iteration."""
        raise TypeError(f"{type(self).__name__} has no step: override run_step")

    def report_metrics(self, metrics: Mapping[str, float]) -> None:
        """Record the results of an evaluation, for the writers and for `metric_now`.

        Args:
            metrics: by the scalars' full names, as "eval/accuracy"; equal on all ranks. A tensor
                with one element is read back.

        Raises:
            ConfigError: a value is not one number.
        """
        for name, given in metrics.items():
            try:
                value = float(given)  # writers and checkpoints hold plain numbers
            except (TypeError, ValueError, RuntimeError) as error:  # torch: several elements
                raise wrong(name, given, "one number") from error
            self.storage.put_scalar(name, value, smoothing_hint=False, reduce="local")
            self._reported[name] = (self.iter_done, value)

    def metrics_now(self) -> dict[str, float]:
        """Return the metrics reported in this iteration."""
        return {name: v for name, (done, v) in self._reported.items() if done == self.iter_done}

    def metric_now(self, name: str) -> float | None:
        """Return a metric reported, or a scalar put on this rank, in this iteration; else None."""
        if name in self._reported:  # one from before the first iteration is put as iteration 0
            return self.reported_now(name)
        return self.storage.put_now(name)

    def reported_now(self, name: str) -> float | None:
        """Return a metric reported in this iteration, which is equal on all ranks; else None."""
        done, value = self._reported.get(name, (-1, 0.0))
        return value if done == self.iter_done else None

    def request_stop(self) -> None:
        """Request a stop of all ranks after one common iteration; safe in a signal handler."""
        self._stop_requested = True
        if hasattr(self, "reduction"):
            self.reduction.stop_request = STOP_REQUESTED

    def listen(self, listener: Callable[[int], None]) -> None:
        """Call a listener at each phase of a step, until `unlisten`."""
        if not isinstance(self.pulse, ObservedHeartbeat):  # without listeners a beat costs no more
            self.pulse = ObservedHeartbeat(self.pulse)
        self.pulse.listeners.append(listener)

    def unlisten(self, listener: Callable[[int], None]) -> None:
        """Remove a listener."""
        assert isinstance(self.pulse, ObservedHeartbeat)
        self.pulse.listeners.remove(listener)
        if not self.pulse.listeners:
            self.pulse = self.pulse.inner

    def _call(self, moment: Moment) -> None:
        for call in self._calls[moment]:
            call()

    def data_state(self) -> Any:
        """Return this rank's position in its data, or None where the iteration determines it."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a resumed run: histories, and the hooks' states by part and name.

        With several ranks, call `reduction.drain` first.
        """
        state: dict[str, Any] = {
            "histories": self.storage.state_dict(),
            # max_iter at the time of an early stop; 0: none
            "early_stop": self.max_iter if self.storage.early_stop else 0,
        }
        if self.settings:
            state["settings"] = self.settings
        for name, hook in self.hooks.items():
            state.setdefault(hook.part, {})[name] = hook.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned, tensors on the CPU, before `train`.

        Hooks not in it keep their state.
        """
        self._histories = state["histories"]
        self._early_stop = bool(state["early_stop"])
        self._end_left = state.get("end")
        for name, hook in self.hooks.items():
            saved = state.get(hook.part, {}).get(name)
            if saved:
                hook.load_state_dict(saved)
