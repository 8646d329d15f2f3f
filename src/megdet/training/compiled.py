"""`--compile`: the dense part of the forward in kernels made for each canvas (torch.compile).

Backbone, pyramid and RPN head do the same arithmetic for every image of a canvas, so they are compiled, each as a
graph of its own and once a canvas. The later parts choose among boxes and are not compiled. `megdet describe` says how
many canvases a plan has; `data.canvas_edges` reduces their number.

A compiled part must contain no collectives: the compiler could reorder them, and differently on ranks whose shares
differ in size. So a part whose batch norms belong to a lane of several devices is not compiled. No kernel is chosen by
timing it (`max-autotune`), because a resumed run must compute what the interrupted one would have computed.

A compiled part delivers all gradients of its weights at the end of its backward. So the gradients of the backbone are
no longer reduced during its own backward; those of the heads and the pyramid still are.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from megdet.errors import InputError
from megdet.layers.batch_norm import CrossDeviceBatchNorm
from megdet.model.detector import Detector
from megdet.recipe import Recipe

MOST_CANVASES = 64
"""Canvases that are compiled; later ones run uncompiled."""

_LOG = logging.getLogger(__name__)


def check_compiler(recipe: Recipe, device: torch.device) -> None:
    """Raise InputError, before any work, if the recipe or this machine does not allow compiling."""
    if recipe.exact:
        raise InputError(
            "--compile does not go with exact: what a compiler makes for a canvas may differ from one machine to the "
            "next; set exact false, or leave --compile out"
        )
    if recipe.recompute != "none":
        raise InputError(
            f"--compile does not go with recompute {recipe.recompute}: what is kept for the backward is then the "
            "compiler's choice; set recompute none, or leave --compile out"
        )
    try:
        torch.compile(_twice, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # compilers raise exceptions of many types
        raise InputError(f"--compile: torch.compile does not work here ({_first_line(error)}): {_REMEDY}") from None


def compile_dense(model: Detector, mode: str | None = None, *, warns: bool = True) -> list[str]:
    """Make training call compiled forwards of the dense parts; returns the names of these parts.

    The modules stay the same, and so do the names in a state dict. `mode` is torch.compile's, for measurements.
    """
    config: Any = torch._dynamo.config
    # a part has one graph a canvas; the others allow for further differences, such as autocast
    config.recompile_limit = max(config.recompile_limit, 2 * MOST_CANVASES)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 8 * MOST_CANVASES)
    for name in model.dense_parts:
        part: nn.Module = getattr(model, name)
        norms = [module for module in part.modules() if isinstance(module, CrossDeviceBatchNorm)]
        if all(norm.lane.width == 1 for norm in norms):
            model.compiled[name] = PerCanvas(name, part, torch.compile(part.forward, dynamic=False, mode=mode))
        elif warns:
            _LOG.warning("--compile: the %s is not compiled, its batch norms talk to other devices", name)
    return list(model.compiled)


class PerCanvas:
    """A part's compiled forward for the first MOST_CANVASES canvases; its plain one for others and for no image."""

    def __init__(self, name: str, part: nn.Module, compiled: Callable[..., Any]) -> None:
        self.name, self.part, self.compiled = name, part, compiled
        self.shapes: set[torch.Size] = set()
        self._has_warned = False

    def __call__(self, x: Any) -> Any:
        """The part's output; `x` is a tensor or a list of tensors, whose first tells the canvas."""
        shape = (x if isinstance(x, torch.Tensor) else x[0]).shape
        if shape[0] == 0:
            return self.part(x)
        if shape not in self.shapes:
            if len(self.shapes) >= MOST_CANVASES:
                self._warn()
                return self.part(x)
            self.shapes.add(shape)
        try:
            return self.compiled(x)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            raise InputError(
                f"--compile: torch.compile cannot compile the {self.name} for {tuple(shape)} ({_first_line(error)}): "
                f"{_REMEDY}; the run goes on from its last checkpoint, if there is one"
            ) from None

    def _warn(self) -> None:
        if not self._has_warned:
            _LOG.warning(
                "--compile: more than %d canvases, so the %s runs uncompiled on the others: set data.canvas_edges",
                MOST_CANVASES,
                self.name,
            )
        self._has_warned = True


_REMEDY = "install a C++ compiler, or leave --compile out"


def _twice(x: torch.Tensor) -> torch.Tensor:
    return x + x


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
