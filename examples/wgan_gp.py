"""A step with two models: a Wasserstein GAN with a gradient penalty.

Gulrajani et al. 2017, "Improved Training of Wasserstein GANs", arXiv:1704.00028::

    model: {generator: {_target_: my.Generator}, critic: {_target_: my.Critic}}
    optim:
      generator: {target: torch.optim.Adam, lr: 1e-4, betas: [0, 0.9]}
      critic: {target: torch.optim.Adam, lr: 1e-4, betas: [0, 0.9]}
    step: {_target_: examples.wgan_gp.WGANStep, noise: 64}
"""

from typing import Any

import torch

import distrain


class WGANStep(distrain.Step):
    """An update of the critic; every few iterations one of the generator.

    Args:
        noise: width of the generator's input.
        penalty: factor of the gradient penalty.
        every: iterations from one update of the generator to the next.
    """

    def __init__(self, noise: int, penalty: float = 10.0, every: int = 5) -> None:
        self.noise, self.penalty, self.every = noise, penalty, every

    def __call__(self, batch: Any) -> None:
        """Train with a batch whose first item is real: (B, ...)."""
        real, generator, critic = batch[0], self.model["generator"], self.model["critic"]
        noise = torch.randn(len(real), self.noise, device=real.device)
        with self.update("critic") as update:
            fake = generator(noise)  # without gradients of the generator
            between = torch.rand(len(real), *[1] * (real.dim() - 1), device=real.device)
            mixed = torch.lerp(fake, real, between).requires_grad_()
            (slope,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
            excess = (slope.flatten(1).norm(dim=1) - 1).square().mean()
            distance = critic(fake).mean() - critic(real).mean()
            update.backward({"distance": distance, "penalty": self.penalty * excess})
        if self.iter % self.every == 0:
            with self.update("generator") as update:
                update.backward(-critic(generator(noise)).mean())
