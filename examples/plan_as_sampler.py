"""MegDet's plan in a plain torch loop: the same images in every step on any number of processes.

    python examples/plan_as_sampler.py
    torchrun --nproc-per-node 2 examples/plan_as_sampler.py
    torchrun --nproc-per-node 4 examples/plan_as_sampler.py

A small network counts bright pixels of noise, 16 images a step in groups of 8. Every process loads its own share of
every step, and the gradients are summed. The printed losses are the same, to the digits that are shown, on one process
and on four. With torch's DistributedSampler another number of processes means other mini-batches.
"""

import os

import torch
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, Dataset

import megdet

BATCH_SIZE, BN_SIZE, IMAGES, EPOCHS = 16, 8, 96, 2


class Noise(Dataset[tuple[Tensor, Tensor]]):
    """Images whose part of bright pixels is to be learned."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pixels = torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
        return pixels, (pixels > 0.5).double().mean()

    def __len__(self) -> int:
        return IMAGES


def main() -> None:
    torch.set_num_threads(1)
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if size > 1:
        distributed.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1)
    ).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    sampler = megdet.PlanSampler(
        [(24, 24)] * IMAGES, batch_size=BATCH_SIZE, bn_size=BN_SIZE, epochs=EPOCHS, rank=rank, num_replicas=size
    )
    batches = iter(DataLoader(Noise(), batch_sampler=sampler))
    for step in range(sampler.num_steps):
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for _ in range(sampler.rounds):
            pixels, bright = next(batches)
            loss = (model(pixels)[:, 0] - bright).square().sum() / BATCH_SIZE
            loss.backward()
            total += loss.detach()
        if size > 1:
            for tensor in (total, *(parameter.grad for parameter in model.parameters())):
                distributed.all_reduce(tensor)
        for group in optimizer.param_groups:
            group["lr"] = megdet.scaled_learning_rate(
                step, base_lr=0.1, batch_size=BATCH_SIZE, num_images=IMAGES, epochs=EPOCHS, warmup_steps=0
            )
        optimizer.step()
        if rank == 0:
            print(f"step {step + 1}: loss {total:.9f}")
    if size > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
