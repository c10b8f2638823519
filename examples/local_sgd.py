"""A strategy: local SGD, which averages parameters every few updates instead of each gradient.

    python -m distrain +experiment=digits launch.ranks=2 hooks.guard=null \
        'trainer.strategy={_target_: examples.local_sgd.LocalSGD, every: 5}'

Each rank trains its own replica on its part of each batch; every `every` updates the replicas are
averaged (McMahan et al. 2017, arXiv:1602.05629). Let `trainer.max_iter` and the periods of
checkpoints be multiples of `every`. Momentum stays each rank's own: hooks.guard, which compares it,
must be off, and a resumed run goes on with that of rank 0.
"""

import torch
import torch.distributed as dist

from distrain.distributed import Strategy
from distrain.errors import ConfigError


class LocalSGD(Strategy):
    """Replicas that are averaged every few updates.

    Args:
        every: updates from one average to the next.
    """

    def __init__(self, every=4):
        self.every = every
        self.num_updates = 0

    def check(self, **settings):
        if settings["nonfinite"] == "skip":  # ranks would not skip the same updates
            raise ConfigError("trainer.nonfinite=skip: expected stop with LocalSGD")

    def wrap(self, module, optimizer, device):
        module = module.to(device)
        if dist.is_initialized():
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, src=0)
            optimizer.register_step_post_hook(lambda *_: self._average(module))
        return module

    @torch.no_grad()
    def _average(self, module):
        self.num_updates += 1
        if self.num_updates % self.every == 0:
            for parameter in module.parameters():
                dist.all_reduce(parameter)
                parameter /= dist.get_world_size()
