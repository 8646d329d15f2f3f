"""The anchors: each cell of a pyramid level has one box for each of the level's sizes and each aspect ratio."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from megdet.architecture_parts import Anchors as AnchorsRecipe
from megdet.ops.constants import constant, stream_of

LEVEL_STRIDES = (4, 8, 16, 32, 64)
_KEPT_CANVASES = 16


class AnchorGrid:
    """Makes the anchors of a canvas and caches the last few canvases; `strides` are those of the levels."""

    def __init__(self, recipe: AnchorsRecipe, strides: Sequence[int] = LEVEL_STRIDES) -> None:
        self.recipe, self.strides = recipe, strides
        self._made: OrderedDict[tuple[object, ...], list[Tensor]] = OrderedDict()

    @property
    def per_cell(self) -> int:
        """Anchors at one cell."""
        return len(self.recipe.ratios) * len(self.recipe.level_sizes[0])

    def __call__(
        self, canvas: tuple[int, int], grids: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device
    ) -> list[Float[Tensor, "_ 4"]]:
        """The anchors of each level, by row, column, ratio, size; `grids` are the levels' heights and widths."""
        key = (canvas, tuple(grids), dtype, device, stream_of(device))
        if key not in self._made:
            while len(self._made) >= _KEPT_CANVASES:
                self._made.popitem(last=False)
            with torch.inference_mode(False):  # training may use anchors that an evaluation made
                levels = [self._level(level, canvas, grid, device) for level, grid in enumerate(grids)]
                self._made[key] = [level.to(dtype) for level in levels]
        return self._made[key]

    def _level(self, level: int, canvas: tuple[int, int], grid: tuple[int, int], device: torch.device) -> Tensor:
        """The anchors of a level, computed on the device: a new canvas must not make the host wait for a copy."""
        cell = constant(tuple(tuple(row) for row in self.cell(level).tolist()), torch.float32, device)
        return laid_out(cell, grid, self.stride(level, canvas, grid))

    def stride(self, level: int, canvas: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
        """Pixels of the canvas from a cell of a level to the next, in y and x."""
        if self.recipe.stride_from_grid:
            return canvas[0] // grid[0], canvas[1] // grid[1]
        return self.strides[level], self.strides[level]

    def cell(self, level: int) -> Float32[Tensor, "anchors 4"]:
        """The anchors at a cell of a level, in pixels from its corner."""
        sizes = torch.tensor(self.recipe.level_sizes[level], dtype=torch.float32)  # whatever torch's default is
        ratios = torch.tensor(self.recipe.ratios, dtype=torch.float32).unsqueeze(1)
        half_height = (sizes * ratios.sqrt() / 2).flatten()
        half_width = (sizes / ratios.sqrt() / 2).flatten()
        cell = torch.stack([-half_width, -half_height, half_width, half_height], dim=1)
        if self.recipe.whole_pixels:
            cell = cell.round()
        return cell


def laid_out(
    cell: Float32[Tensor, "anchors 4"], grid: tuple[int, int], stride: tuple[int, int]
) -> Float32[Tensor, "_ 4"]:
    """The anchors at every cell of a grid of this height and width, ordered by row, column and index in the cell."""
    y = torch.arange(grid[0], dtype=torch.float32, device=cell.device) * stride[0]
    x = torch.arange(grid[1], dtype=torch.float32, device=cell.device) * stride[1]
    y, x = torch.meshgrid(y, x, indexing="ij")
    shift = torch.stack([x, y, x, y], dim=2)
    return (shift.unsqueeze(2) + cell).reshape(-1, 4)
