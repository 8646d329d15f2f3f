"""All that a step changes, as named tensors: to save, to put back, to send to every rank, to compare."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from megdet.distributed.world import World
from megdet.journal.checkpoint_files import Kind
from megdet.training.optimizer import like_parameter, restore_state, state_by_name, state_layout
from megdet.training.step import Trainer

Tensors = dict[Kind, dict[str, Tensor]]


def checkpoint_tensors(trainer: Trainer) -> Tensors:
    """The tensors of a checkpoint, which `restore` puts back."""
    tensors: Tensors = {
        "model": trainer.model.state_dict(),
        "optimizer": state_by_name(trainer.model, trainer.optimizer),
    }
    if trainer.averages is not None:
        tensors["averages"] = trainer.averages.tensors
    if trainer.modulator is not None:
        tensors["agvm"] = {"factors": trainer.modulator.factors}
    if trainer.noise is not None:
        kept = dict(zip(trainer.buckets.parameters, trainer.noise.kept, strict=False))
        own = {f"gradient.{name}": kept[p] for name, p in trainer.model.named_parameters() if p in kept}
        tensors["noise"] = {"averages": trainer.noise.averages, **own}
    return tensors


def tensor_layout(trainer: Trainer, step: int) -> Tensors:
    """Names, shapes and dtypes of `checkpoint_tensors` after so many steps, as tensors without values."""
    layout: Tensors = {
        "model": trainer.model.state_dict(),
        "optimizer": state_layout(trainer.model, trainer.optimizer) if step else {},
    }
    if trainer.averages is not None:
        layout["averages"] = trainer.averages.tensors
    if trainer.modulator is not None:
        layout["agvm"] = {"factors": trainer.modulator.factors}
    if trainer.noise is not None:
        layout["noise"] = {"averages": trainer.noise.averages}
        if step and trainer.noise.keeps_gradient(step):
            trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
            layout["noise"] |= {f"gradient.{name}": parameter for name, parameter in trained.items()}
    return {kind: {name: _without_values(t) for name, t in own.items()} for kind, own in layout.items()}


def restore(trainer: Trainer, tensors: Tensors) -> None:
    """Put back what `checkpoint_tensors` returned; whether it fits must have been checked before."""
    trainer.model.load_state_dict(tensors["model"])
    restore_state(trainer.model, trainer.optimizer, tensors["optimizer"])
    if trainer.averages is not None:
        for name, tensor in tensors["averages"].items():
            trainer.averages.tensors[name].copy_(tensor)
    if trainer.modulator is not None:
        trainer.modulator.factors.copy_(tensors["agvm"]["factors"])
    if trainer.noise is not None:
        trainer.noise.averages.copy_(tensors["noise"]["averages"])
        names = {parameter: f"gradient.{name}" for name, parameter in trainer.model.named_parameters()}
        kept = [(parameter, tensors["noise"].get(names[parameter])) for parameter in trainer.buckets.parameters]
        trainer.noise.kept = [like_parameter(tensor, own) for own, tensor in kept if tensor is not None]


def restore_everywhere(trainer: Trainer, tensors: Tensors, step: int, world: World) -> None:
    """Put rank 0's tensors, which fit, into the trainer of every rank; on the others `tensors` is not looked at."""
    if world.size > 1:
        own = tensors if world.is_first else tensor_layout(trainer, step)
        tensors = {
            kind: {name: _on_device(own[kind][name], world.device) for name in names}
            for kind, names in tensor_layout(trainer, step).items()  # the order is the same on every rank
        }
        world.broadcast(tensor for group in tensors.values() for tensor in group.values())
    restore(trainer, tensors)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values, whatever the device and the memory format."""
    content = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        content.update(flat.view(torch.uint8).numpy().data)  # NumPy has no bfloat16
    return content.hexdigest()


def _without_values(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta", requires_grad=False)


def _on_device(tensor: Tensor, device: torch.device) -> Tensor:
    return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)
