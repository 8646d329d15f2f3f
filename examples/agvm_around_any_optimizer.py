"""Linear scaling, warmup and AGVM around any optimizer, in a loop of your own.

    python examples/agvm_around_any_optimizer.py

torch's Adagrad, of which MegDet knows nothing, trains a network of two modules. Each mini-batch comes in two halves. A
module about whose gradient the halves disagree more than about that of the body gets a lower rate, and one about which
they disagree less a higher one; the factors move slowly, a thirtieth of the way in every tenth step.
"""

import torch
from torch import nn
from torch.nn import functional as F

import megdet

BATCH_SIZE, IMAGES, EPOCHS = 64, 640, 6


def main() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"body": nn.Linear(16, 32), "head": nn.Linear(32, 4)})
    optimizer = torch.optim.Adagrad(megdet.module_groups(model), lr=0.0)
    rates = megdet.ModuleRates(model, optimizer, reference="body", warmup_steps=10)
    inputs = torch.randn(IMAGES, 16)
    labels = inputs[:, :4].argmax(dim=1).where(torch.rand(IMAGES) < 0.5, torch.randint(4, (IMAGES,)))
    steps_of_epoch = IMAGES // BATCH_SIZE
    for step in range(EPOCHS * steps_of_epoch):
        first = step % steps_of_epoch * BATCH_SIZE
        optimizer.zero_grad()
        loss = 0.0
        for half in range(2):
            own = slice(first + half * BATCH_SIZE // 2, first + (half + 1) * BATCH_SIZE // 2)
            scores = model["head"](F.relu(model["body"](inputs[own])))
            part = F.cross_entropy(scores, labels[own], reduction="sum") / BATCH_SIZE
            part.backward()
            loss += float(part.detach())
            if half == 0:
                rates.first_half_done(step)
        rates.set(
            megdet.scaled_learning_rate(
                step,
                base_lr=0.02,
                batch_size=BATCH_SIZE,
                num_images=IMAGES,
                epochs=EPOCHS,
                milestones=(4, 5),
                factors=(0.1, 0.1),
                warmup_steps=10,
            )
        )
        optimizer.step()
        if step % steps_of_epoch == 0:
            rate, shown = optimizer.param_groups[0]["lr"], rates.factors["head"]
            print(f"epoch {step // steps_of_epoch + 1}: loss {loss:.4f}, rate {rate:.5f}, of the head x {shown:.3f}")


if __name__ == "__main__":
    main()
