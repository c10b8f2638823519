"""Several optimizers behind one: each for its own parameters of one model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from distrain.errors import ConfigError
from distrain.optim.groups import places_of
from distrain.optim.rules import Rule, plain, pop_conditions


class CombinedOptimizer(Optimizer):
    """One optimizer that steps several, which have no parameter in common, else ValueError.

    Its `param_groups` are those of all, in order, so schedules, clipping and the scaling of
    gradients see one optimizer; its `state` holds the states of all. Checkpoints look like those of
    any other optimizer.

    Args:
        optimizers: new ones, without state.
    """

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self.optimizers = [*optimizers]
        # torch adds the dicts themselves: a rate that a schedule sets is the inner optimizer's
        super().__init__([group for each in self.optimizers for group in each.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let the inner optimizers use this one's state and groups."""
        groups = iter(self.param_groups)
        for optimizer in self.optimizers:
            optimizer.state = self.state
            count = len(optimizer.param_groups)
            optimizer.param_groups = [*itertools.islice(groups, count)]

    @override
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Step all; a closure is refused, as each would call it."""
        if closure is not None:
            raise ValueError("CombinedOptimizer: expected no closure")
        for optimizer in self.optimizers:
            optimizer.step()

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # of load_state_dict: the groups are new dicts
        self._share()


def split_parameters(
    model: nn.Module, groups: Mapping[str, Mapping[str, Any] | None]
) -> tuple[dict[str, tuple[set[nn.Parameter], dict[str, Any]]], set[nn.Parameter]]:
    """Divide the trainable parameters of a model: the first group that matches one has it.

    Args:
        model: the model.
        groups: `match`, `module` and `dims` of `Rule`, and other settings, by the group's name;
            None leaves one out.

    Returns:
        the parameters and the other settings by the group's name, and the remaining parameters.

    Raises:
        ConfigError: a group has no condition, or matches no trainable parameter that is left.
    """
    places = {p: at for p, at in places_of(model).items() if p.requires_grad}
    rest = set(places)
    found: dict[str, tuple[set[nn.Parameter], dict[str, Any]]] = {}
    for name, node in groups.items():
        if node is None:
            continue
        if not isinstance(node, Mapping):
            raise ConfigError(f"groups.{name}: expected a mapping, as {{dims: 2, target: ...}}")
        settings = {str(key): plain(value) for key, value in node.items()}
        rule = Rule(name, **pop_conditions(f"groups.{name}", settings))
        if not (rule.patterns or rule.module or rule.dims):
            raise ConfigError(f"groups.{name}: no match condition; give match, module or dims")
        members = {p for p in rest if rule.matches(p, places[p])}
        if not members:
            raise rule.nothing_matched((places[p] for p in places if p in rest), "groups")
        rest -= members
        found[name] = members, settings
    return found, rest
