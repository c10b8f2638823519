"""The digits experiment as a plain script for torchrun; `benchmarks/startup.py` starts it."""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

from benchmarks.first_step import note_first_step
from distrain.experiments.digits import Digits, DigitsNet

dist.init_process_group("gloo")
model = DistributedDataParallel(DigitsNet(width=24))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
loader = torch.utils.data.DataLoader(Digits(split="train"), batch_size=64, shuffle=True)
writer = SummaryWriter("tensorboard") if dist.get_rank() == 0 else None
for step, batch in enumerate(loader):
    loss = model(*batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step == 0:
        note_first_step()
        break
dist.destroy_process_group()
