"""Cross-device batch norm in a training loop of your own: three lines, any number of processes, one result.

    python examples/cross_device_batch_norm.py
    torchrun --nproc-per-node 2 examples/cross_device_batch_norm.py
    torchrun --nproc-per-node 4 examples/cross_device_batch_norm.py

torchvision's ResNet-18 learns to classify from batches of 8 images, all of them normalised together. However many
processes share the batch, the printed losses and the checksum of weights and running statistics agree to the digits
that are shown. With torch's own batch norm in every process they would not.
"""

import os

import torch
from torch import distributed
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import resnet18

from megdet.layers import convert_batch_norm

BATCH_SIZE = 8
STEPS = 5


def main() -> None:
    torch.set_num_threads(1)
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    torch.manual_seed(0)
    model = resnet18(num_classes=10).double()

    if size > 1:
        distributed.init_process_group("gloo")
    model = convert_batch_norm(model, bn_size=BATCH_SIZE, images_per_device=BATCH_SIZE // size)
    parallel = DistributedDataParallel(model) if size > 1 else model

    optimizer = torch.optim.SGD(model.parameters(), lr=0.002, momentum=0.9)
    images, labels = torch.randn(STEPS, BATCH_SIZE, 3, 64, 64).double(), torch.randint(10, (STEPS, BATCH_SIZE))
    own = slice(rank * BATCH_SIZE // size, (rank + 1) * BATCH_SIZE // size)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(parallel(images[step, own]), labels[step, own])
        loss.backward()
        optimizer.step()
        mean = loss.detach() / size
        if size > 1:
            distributed.all_reduce(mean)
        if rank == 0:
            print(f"step {step + 1}: loss {mean:.9f}")
    if rank == 0:
        checksum = sum(float(tensor.double().abs().sum()) for tensor in model.state_dict().values())
        print(f"weights and running statistics, sum of magnitudes: {checksum:.6f}")
    if size > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
