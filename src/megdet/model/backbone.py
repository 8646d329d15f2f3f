"""The backbone: any timm model with features at strides 4, 8, 16 and 32, or dilated (atrous) from a stride on."""

import inspect
import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from jaxtyping import Float
from timm.models.resnet import Bottleneck
from torch import Tensor, nn

from megdet.architecture_parts import Backbone as BackboneRecipe
from megdet.distributed.lane import Lane
from megdet.errors import InputError, nearest
from megdet.layers.convert import exchange_norms
from megdet.layers.frozen_norm import FrozenBatchNorm
from megdet.layers.recompute import RecomputedBlocks, saved_bytes, sublinear_segments
from megdet.layers.recomputed_outputs import hold, mark_activations, recompute_outputs
from megdet.model.stages import deform_stages, freeze_stages
from megdet.model.weight_file import misfit, read_tensors
from megdet.recipe import RecomputePlan

STRIDES = (4, 8, 16, 32)
_PLACES = {"body.": "", "last.0.": "conv_head.", "last.1.": "bn2."}
"""Names of layers of the backbone beside timm's names for them in the whole network."""
_ALWAYS_RANDOM = (nn.RReLU, nn.FractionalMaxPool2d)
"""Layers of torch that draw random numbers in training whatever their arguments."""


class Backbone(nn.Module):
    """Features C2 to C5.

    Its weights are random; `load_pretrained` loads a file.

    Args:
        recipe: the model and its norm layers.
        lane: the ranks that share batch statistics; None = frozen statistics.
        recompute: which blocks are computed again in the backward.
    """

    def __init__(self, recipe: BackboneRecipe, lane: Lane | None, recompute: RecomputePlan = "none") -> None:
        super().__init__()
        self.name = recipe.name
        # built twice: only timm knows which layers make the features. Both builds draw random numbers before the heads
        # do, so building one network only (or one on the meta device) would change the initial weights of the heads.
        whole = _whole_model(recipe.name)
        body = _features(whole, recipe)
        self.strides = tuple(min(stride, recipe.output_stride) for stride in STRIDES)
        """channels of C2 to C5"""
        reductions = body.feature_info.reduction()
        self.picked = _last_of(self.strides, reductions)
        if len(self.picked) < len(STRIDES):
            wanted = "4 to 32" if recipe.output_stride == STRIDES[-1] else ", ".join(map(str, self.strides))
            raise InputError(f"model.backbone.name {recipe.name}: its features have strides {reductions}, not {wanted}")
        if getattr(body, "output_fmt", "NCHW") != "NCHW":
            raise InputError(
                f"model.backbone.name {recipe.name}: its features have their channels last, which is not supported"
            )
        self.channels = [body.feature_info.channels()[index] for index in self.picked]
        try:
            _copy_shared(whole, body)
        except KeyError as error:
            raise InputError(
                f"model.backbone.name {recipe.name}: its features have a layer {error} of their own"
            ) from None
        except RuntimeError:  # some layers have a weight for each position of a map of fixed size
            if recipe.output_stride == STRIDES[-1]:
                raise
            raise _not_atrous(recipe) from None
        self.body: Any = body
        self.last = nn.Sequential()
        if recipe.last_convolution:
            if not isinstance(getattr(whole, "conv_head", None), nn.Conv2d) or not hasattr(whole, "bn2"):
                raise InputError(
                    f"model.backbone.last_convolution: {recipe.name} has no convolution before its classifier"
                )
            self.last = nn.Sequential(whole.conv_head, whole.bn2)
            self.channels[-1] = whole.conv_head.out_channels
        _refuse_random_layers(self.body, recipe.name)
        _refuse_random_layers(self.last, recipe.name)
        if recipe.stride_in_1x1:
            _stride_in_1x1(self.body, recipe.name)
        if recipe.norm_eps is not None:
            _set_eps(self, recipe.norm_eps)
        deform_stages(self.body, recipe)
        freeze_stages(self.body, recipe.frozen_stages)
        exchange_norms(self, recipe.norm, lane)
        mark_activations(self)
        if recompute != "none":
            recompute_blocks(self.body, recompute, recipe.name)

    @property
    def has_blocks(self) -> bool:
        """Whether the backbone is a sequence of blocks that can be recomputed."""
        return bool(_stages(self.body))

    def set_recompute(self, plan: RecomputePlan) -> None:
        """Change what is recomputed from the next forward on; parameters and buffers stay the same tensors."""
        if plan != "none" or any(isinstance(module, RecomputedBlocks) for module in self.body.modules()):
            recompute_blocks(self.body, plan, self.name)

    def forward(self, images: Float[Tensor, "images 3 height width"]) -> list[Float[Tensor, "images _ _ _"]]:
        """The features, whose strides are 4, 8, 16 and 32, or at most `output_stride`."""
        with recompute_outputs():
            features = self.body(images)
            c2, c3, c4, c5 = (features[index] for index in self.picked)
            hold((c2, c3, c4, c5))
        return [c2, c3, c4, self.last(c5)]


def recompute_blocks(body: nn.Module, plan: RecomputePlan, name: str) -> None:
    """Replace the stages of a network, sequences of blocks, by stages that are computed again in the backward.

    `block` cuts after every block, `stage` after every stage, `sqrt` where the planner of Chen et al. (2016) finds the
    least memory, `none` nowhere. Raises InputError for a network that is not a sequence of blocks.
    """
    stages = _stages(body)
    if not stages:
        raise InputError(f"recompute {plan}: {name} has no sequence of blocks that could be recomputed; use none")
    starts = list(itertools.accumulate((len(stage) for stage in stages.values()), initial=0))
    if plan == "sqrt":
        inside, kept = _block_bytes(body, list(stages.values()))
        segments = sublinear_segments(inside, kept, starts[1:])
    elif plan in ("block", "none"):
        segments = [range(i, i + 1) for i in range(starts[-1])]
    else:
        segments = list(itertools.starmap(range, itertools.pairwise(starts)))
    for (path, stage), start, end in zip(stages.items(), starts[:-1], starts[1:], strict=True):
        own = [range(part.start - start, part.stop - start) for part in segments if start <= part.start < end]
        if plan == "none":
            own = []
        body.set_submodule(path, RecomputedBlocks(stage, own))


def _stages(module: nn.Module, path: str = "") -> dict[str, nn.Sequential]:
    """The innermost `nn.Sequential`s whose modules have submodules: the stages of a residual network."""
    found: dict[str, nn.Sequential] = {}
    for name, child in module.named_children():
        own = f"{path}.{name}" if path else name
        blocks = list(child.children())
        is_stage = type(child) in (nn.Sequential, RecomputedBlocks) and all(
            not isinstance(block, nn.Sequential) and any(True for _ in block.children()) for block in blocks
        )
        if is_stage and blocks:
            found[own] = child  # type: ignore[assignment]
        else:
            found |= _stages(child, own)
    return found


def _block_bytes(body: nn.Module, stages: list[nn.Sequential]) -> tuple[list[int], list[int]]:
    """Bytes that the backward of each block needs, and bytes of each block's output, for one small image."""
    inside: list[int] = []
    kept: list[int] = []
    inputs: list[Tensor] = []
    blocks = [block for stage in stages for block in stage]
    hooks = [block.register_forward_pre_hook(lambda _block, given: inputs.append(given[0])) for block in blocks]
    was_training = body.training
    with torch.no_grad():
        body.eval()(next(body.parameters()).new_zeros(1, 3, 64, 64))
    for hook in hooks:
        hook.remove()
    for block, x in zip(blocks, inputs, strict=True):
        inside.append(saved_bytes(partial(block, x), list(block.parameters())))
        kept.append(int(block(x).nbytes))
    body.train(was_training)
    return inside, kept


def load_pretrained(backbone: Backbone, file: Path) -> None:
    """Load a weight file of torchvision or timm into a backbone, all tensors or none.

    Raises InputError as `pretrained_tensors` does.
    """
    given = pretrained_tensors(backbone.name, file)
    joined = {name.replace(".", "_"): tensor for name, tensor in given.items()}  # as in some of timm's networks
    found = {}
    for name in backbone.state_dict():
        place = next(theirs + name.removeprefix(ours) for ours, theirs in _PLACES.items() if name.startswith(ours))
        layer, _, leaf = place.rpartition(".")
        for known in (place, f"{layer.removesuffix('.0')}.{leaf}"):  # a group norm may be in a Sequential
            if known.replace(".", "_") in joined:
                found[name] = joined[known.replace(".", "_")]
                break
    backbone.load_state_dict(found, strict=False)


def pretrained_tensors(name: str, file: Path) -> dict[str, Tensor]:
    """The tensors of a file by their names in timm's model `name`, without those of the classifier.

    Tensors are matched by name, or by order and shape if names differ. Only the classifier may be missing or have
    another shape. Raises InputError that names the first tensor that does not fit.
    """
    with torch.device("meta"):  # names and shapes without memory
        model = _whole_model(name)
    tensors = read_tensors(file, "model.backbone.weights")
    classifier = {
        name
        for prefix in _classifier_prefixes(model)
        for name in model.state_dict()
        if name.startswith(f"{prefix}.") or name == prefix
    }
    wanted = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name not in classifier and not name.endswith("num_batches_tracked")
    }
    given = {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}
    num_classifier = sum(not name.endswith("num_batches_tracked") for name in classifier)
    if all(name in given for name in wanted):
        left_over = next((name for name in given if name not in wanted and name not in classifier), None)
        if left_over is not None:
            raise InputError(
                f"model.backbone.weights {file}: {type(model).__name__} has no place for the file's {left_over}: "
                "the file is of another model"
            )
        pairs = {name: given[name] for name in wanted}
    else:
        if len(given) not in (len(wanted), len(wanted) + num_classifier):
            raise InputError(
                f"model.backbone.weights {file}: it has {len(given)} tensors, {type(model).__name__} needs "
                f"{len(wanted)} and {num_classifier} for its classifier: the file is of another model"
            )
        pairs = dict(zip(wanted, given.values(), strict=False))
    for name, tensor in pairs.items():
        fault = misfit(name, tensor, wanted[name])
        if fault:
            raise InputError(f"model.backbone.weights {file}: {fault}: the file is of another model")
    return pairs


def _whole_model(name: str) -> Any:
    if not timm.is_model(name):
        raise InputError(f"model.backbone.name {name}: timm has no such model{nearest(name, timm.list_models())}")
    return timm.create_model(name, pretrained=False)


def _features(whole: nn.Module, recipe: BackboneRecipe) -> Any:
    """timm's feature network for a whole network, its last stages dilated if asked for (Chen et al., 2015).

    Raises InputError if timm cannot build it, or not with the recipe's largest stride.
    """
    atrous: dict[str, Any] = {} if recipe.output_stride == STRIDES[-1] else {"output_stride": recipe.output_stride}
    try:
        return timm.create_model(recipe.name, pretrained=False, features_only=True, **_no_drops(whole), **atrous)
    except RuntimeError:
        raise InputError(f"model.backbone.name {recipe.name}: this timm model offers no features by stride") from None
    except (TypeError, AssertionError):  # the model has no such argument, or its blocks cannot be dilated
        if not atrous:
            raise
        raise _not_atrous(recipe) from None


def _not_atrous(recipe: BackboneRecipe) -> InputError:
    return InputError(
        f"model.backbone.output_stride {recipe.output_stride}: timm does not build {recipe.name} with it: set it to 32 "
        "or choose another backbone"
    )


def _no_drops(model: nn.Module) -> dict[str, Any]:
    """The arguments that build a model of this class without dropout and stochastic depth: each drop rate as 0."""
    taken = inspect.signature(type(model).__init__).parameters
    return {name: 0.0 for name in taken if "drop" in name and name.endswith("rate")}


def _last_of(strides: Sequence[int], reductions: Sequence[int]) -> list[int]:
    """For each stride the index of the last map with it before the map of the next stride; fewer if one is missing."""
    picked: list[int] = []
    end = len(reductions)
    for stride in reversed(strides):
        end = next((index for index in range(end - 1, -1, -1) if reductions[index] == stride), -1)
        if end >= 0:
            picked.insert(0, end)
    return picked


def _refuse_random_layers(model: nn.Module, name: str) -> None:
    """Raise InputError if a layer draws random numbers: they would depend on the devices and on recomputation."""
    for path, layer in model.named_modules():
        rates = {
            key: value
            for key, value in vars(layer).items()
            if ("drop" in key or key == "p") and isinstance(value, float) and value > 0
        }
        if rates or isinstance(layer, _ALWAYS_RANDOM):
            what = "".join(f", its {key} is {value:g}" for key, value in rates.items())
            raise InputError(
                f"model.backbone.name {name}: its layer {path} ({type(layer).__name__}) is random{what}, and timm "
                "has no argument to turn it off; the result would depend on the devices: choose another backbone"
            )


def _classifier_prefixes(model: nn.Module) -> tuple[str, ...]:
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier", ())
    return (classifier,) if isinstance(classifier, str) else tuple(classifier)


def _copy_shared(whole: nn.Module, body: nn.Module) -> None:
    """Copy the tensors of the whole model into the feature network, which has the same layers, by name or by order."""
    source = whole.state_dict()
    target = body.state_dict()
    if all(name in source for name in target):
        pairs = {name: source[name] for name in target}
    else:  # timm joins nested names with underscores in some feature networks
        joined = {name.replace(".", "_"): tensor for name, tensor in source.items()}
        pairs = {name: joined[name.replace(".", "_")] for name in target}
    body.load_state_dict(pairs)


def _stride_in_1x1(model: nn.Module, name: str) -> None:
    """Move the stride of each bottleneck from its 3 x 3 convolution to the 1 x 1 convolution before it.

    Raises InputError for a network without such strides.
    """
    blocks = [block for block in model.modules() if type(block) is Bottleneck and block.conv2.stride != (1, 1)]
    if not blocks:
        raise InputError(
            f"model.backbone.stride_in_1x1: {name} has no bottleneck with a stride in its 3 x 3 convolution"
        )
    for block in blocks:
        block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)


def _set_eps(model: nn.Module, eps: float) -> None:
    for module in model.modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm)):
            module.eps = eps
