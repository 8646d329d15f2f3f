"""3 x 3 convolutions in Winograd's form, for float32 on a CPU.

A tile of 4 x 4 outputs takes 36 multiplications a pair of channels instead of 144, in the forward and in both
gradients: F(4 x 4, 3 x 3) of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016. Its
rounding error is about twice that of plain float32 sums. The points of the interpolation are chosen for that: 0, +-3/4,
+-3/2 and infinity; the usual 0, +-1, +-2 have twice the error. `bench/winograd.py` measures time and error.

    tiles of 6 x 6 inputs, 2 in common with their neighbours  --B-->  36 numbers
    3 x 3 weights                                             --G-->  36 numbers
    their products, summed over channels: 36 matrix products
    36 numbers                                                --A-->  tiles of 4 x 4 outputs

B, G and A are matrix products as well, over as many tiles as stay in a processor's cache.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from megdet.ops.products import onednn_is_faster, product, products

TILE = 4
"""outputs of a tile in each direction"""
_INPUTS = TILE + 2
_POINTS = _INPUTS**2
_CHUNK = 200_000 if onednn_is_faster() else 50_000
"""tiles x channels of a chunk: 7 MB of numbers for MKL; oneDNN is called once a point, which needs larger products"""


def convolve_3x3(
    maps: Sequence[Float[Tensor, "_ inputs _ _"]],
    weight: Float[Tensor, "outputs inputs 3 3"],
    bias: Float[Tensor, " outputs"] | None = None,
) -> list[Float[Tensor, "_ outputs _ _"]]:
    """The convolution of stride 1 and padding 1 of several maps with the same weights.

    Each map has its own number of images and size. For float32 tensors on a CPU; fastest with channels last.
    """
    found: tuple[Tensor, ...] = _Winograd.apply(weight, bias, *maps)
    return list(found)


def num_tiles(height: int, width: int) -> int:
    """The number of tiles that cover a map."""
    return -(-height // TILE) * -(-width // TILE)


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, *maps: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(weight, *maps)
        return _convolved(maps, _of_weights(weight).transpose(1, 2), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, *maps = ctx.saved_tensors
        needs_weight, needs_bias, *needs_maps = ctx.needs_input_grad
        of_weight = _weight_gradient(maps, gradients) if needs_weight else None
        of_bias = torch.stack([own.sum((0, 2, 3)) for own in gradients]).sum(0) if needs_bias else None
        ctx.maybe_clear_saved_tensors()
        del maps  # freed before the gradients of the maps are made: a step's memory peaks here
        of_maps: Sequence[Tensor | None] = [None] * len(gradients)
        if any(needs_maps):
            of_maps = _convolved(gradients, _of_weights(weight, turns=True), None)
        return of_weight, of_bias, *of_maps


class _Piece(NamedTuple):
    """Tiles of one map that are computed together: whole images, or rows of tiles of one image."""

    map_index: int
    images: slice
    rows: slice
    """rows of tiles"""
    columns: int
    """columns of tiles"""
    start: int
    """its first tile in the chunk"""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Images, rows of tiles and columns of tiles."""
        return self.images.stop - self.images.start, self.rows.stop - self.rows.start, self.columns


class _Chunk(NamedTuple):
    """Pieces that share their matrix products."""

    pieces: tuple[_Piece, ...]
    num_tiles: int


@lru_cache(maxsize=4096)
def _chunks(shapes: tuple[torch.Size, ...], channels: int) -> tuple[_Chunk, ...]:
    """All tiles of maps of these shapes (images, channels, height, width), in chunks of about equal size."""
    limit = max(1, _CHUNK // channels)
    chunks: list[_Chunk] = []
    pieces: list[_Piece] = []
    total = 0
    for piece in _pieces(shapes, limit):
        own = math.prod(piece.shape)
        if pieces and total + own > limit:
            chunks.append(_Chunk(tuple(pieces), total))
            pieces, total = [], 0
        pieces.append(piece._replace(start=total))
        total += own
    if pieces:
        chunks.append(_Chunk(tuple(pieces), total))
    return tuple(chunks)


def _pieces(shapes: Sequence[torch.Size], limit: int) -> Iterator[_Piece]:
    for index, (images, _, height, width) in enumerate(shapes):
        rows, columns = -(-height // TILE), -(-width // TILE)
        of_image = rows * columns
        if of_image == 0:
            continue
        if of_image <= limit:
            for start, end in _parts(images, limit // of_image):
                yield _Piece(index, slice(start, end), slice(0, rows), columns, 0)
            continue
        for image in range(images):
            for start, end in _parts(rows, max(1, limit // columns)):
                yield _Piece(index, slice(image, image + 1), slice(start, end), columns, 0)


def _parts(count: int, most: int) -> Iterator[tuple[int, int]]:
    """`count` items split into as few parts as possible of at most `most`, of about equal size."""
    parts = -(-count // most)
    for part in range(parts):
        yield count * part // parts, count * (part + 1) // parts


def _convolved(
    maps: Sequence[Tensor], weights: Float[Tensor, "points inputs outputs"], bias: Tensor | None
) -> tuple[Tensor, ...]:
    outputs = weights.shape[2]
    found = [torch.empty(len(x), outputs, *x.shape[2:], dtype=x.dtype, memory_format=torch.channels_last) for x in maps]
    rows, places = _rows(maps), _rows(found)
    for chunk in _chunks(tuple(x.shape for x in maps), weights.shape[1]):
        tiles = product(_constants().outputs, products(_of_inputs(rows, chunk), weights).flatten(1))
        if bias is not None:
            tiles.view(-1, outputs).add_(bias)
        for piece in chunk.pieces:
            _write(_part(tiles, chunk, piece, TILE, outputs), places[piece.map_index], piece)
    return tuple(found)


def _weight_gradient(maps: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    inputs, outputs = maps[0].shape[1], gradients[0].shape[1]
    rows, own = _rows(maps), _rows(gradients)
    total: Tensor | None = None
    for chunk in _chunks(tuple(x.shape for x in maps), max(inputs, outputs)):
        of_inputs = _of_inputs(rows, chunk)  # first: it takes more memory on its way
        total = products(_of_gradients(own, chunk).transpose(1, 2), of_inputs, onto=total)
    if total is None:
        return maps[0].new_zeros(outputs, inputs, 3, 3)
    kernel = product(_constants().weights.t(), total.flatten(1)).view(3, 3, outputs, inputs)
    return kernel.permute(2, 0, 1, 3).contiguous().permute(0, 3, 1, 2)  # channels last, as convolutions have theirs


def _of_weights(weight: Tensor, *, turns: bool = False) -> Float[Tensor, "points outputs inputs"]:
    """G applied to the weights; `turns` takes the weights turned by 180 degrees, for the gradient of the input."""
    flat = weight.permute(2, 3, 0, 1).reshape(9, -1)
    constant = _constants().weights
    return product(constant.flip(1) if turns else constant, flat).view(_POINTS, *weight.shape[:2])


def _of_inputs(rows: Sequence[Tensor], chunk: _Chunk) -> Float[Tensor, "points tiles channels"]:
    """B applied to the chunk's tiles, each with the pixels around it."""
    return product(_constants().inputs, _cut(rows, chunk, _INPUTS)).view(_POINTS, chunk.num_tiles, -1)


def _of_gradients(rows: Sequence[Tensor], chunk: _Chunk) -> Float[Tensor, "points tiles channels"]:
    """A transposed, applied to the gradients of the chunk's tiles."""
    return product(_constants().outputs.t(), _cut(rows, chunk, TILE)).view(_POINTS, chunk.num_tiles, -1)


def _cut(rows: Sequence[Tensor], chunk: _Chunk, edge: int) -> Float[Tensor, "pixels tiles_channels"]:
    """The tiles of a chunk with `edge` x `edge` pixels each; they overlap if `edge` is over 4."""
    channels = rows[0].shape[3]
    tiles = rows[0].new_empty(edge * edge, chunk.num_tiles * channels)
    for piece in chunk.pieces:
        pixels = _padded(rows[piece.map_index], piece, border=(edge - TILE) // 2)
        image, row, column, channel = pixels.stride()
        size = (edge, edge, *piece.shape, channels)
        windows = pixels.as_strided(size, (row, column, image, TILE * row, TILE * column, channel))
        _part(tiles, chunk, piece, edge, channels).copy_(windows)
    return tiles


def _part(
    tiles: Tensor, chunk: _Chunk, piece: _Piece, edge: int, channels: int
) -> Float[Tensor, "edge edge images rows columns channels"]:
    """A piece's part of the tiles of its chunk."""
    _, down, across = piece.shape
    row = chunk.num_tiles * channels
    strides = (edge * row, row, down * across * channels, across * channels, channels, 1)
    return tiles.as_strided((edge, edge, *piece.shape, channels), strides, piece.start * channels)


def _padded(rows: Tensor, piece: _Piece, border: int) -> Tensor:
    """The pixels of a piece and `border` around it, with zeros outside the map."""
    _, height, width, _ = rows.shape
    top, bottom = TILE * piece.rows.start - border, TILE * piece.rows.stop + border
    inside = rows[piece.images, max(top, 0) : min(bottom, height)]
    right = TILE * piece.columns - width + border
    around = (0, 0, border, right, max(-top, 0), max(bottom - height, 0))
    return F.pad(inside, around) if any(around) else inside


def _write(tiles: Tensor, rows: Tensor, piece: _Piece) -> None:
    """Write the tiles of a piece into its map, without the part beyond the map's edges."""
    _, height, width, channels = rows.shape
    images, down, across = piece.shape
    top, bottom = TILE * piece.rows.start, min(TILE * piece.rows.stop, height)
    place = rows[piece.images, top:bottom]
    ordered = tiles.permute(2, 3, 0, 4, 1, 5)
    if bottom - top == TILE * down and width == TILE * across:
        place.view(images, down, TILE, across, TILE, channels).copy_(ordered)
    else:
        whole = ordered.reshape(images, TILE * down, TILE * across, channels)
        place.copy_(whole[:, : bottom - top, :width])


def _rows(maps: Sequence[Tensor]) -> list[Float[Tensor, "images _ _ channels"]]:
    return [own.permute(0, 2, 3, 1) for own in maps]


@dataclass(frozen=True)
class _Constants:
    """The linear maps, each for both directions at once (Kronecker products)."""

    inputs: Float[Tensor, "36 36"]
    """B"""
    weights: Float[Tensor, "36 9"]
    """G"""
    outputs: Float[Tensor, "16 36"]
    """A"""


@cache
def _constants() -> _Constants:
    points = [0.0, 0.75, -0.75, 1.5, -1.5]
    inputs, weights, outputs = torch.zeros(3, _INPUTS, _INPUTS, dtype=torch.float64).unbind()
    for index, point in enumerate(points):
        others = [other for other in points if other != point]
        scale = 1.0
        polynomial = [1.0]
        for other in others:
            scale *= point - other
            polynomial = _times(polynomial, other)
        inputs[index, : len(points)] = torch.tensor(polynomial, dtype=torch.float64)
        for power in range(TILE):
            outputs[power, index] = point**power
        for power in range(3):
            weights[index, power] = point**power / scale
    polynomial = [1.0]
    for point in points:
        polynomial = _times(polynomial, point)
    inputs[-1] = torch.tensor(polynomial, dtype=torch.float64)
    outputs[TILE - 1, -1] = weights[-1, 2] = 1.0
    both = [torch.kron(one, one).float() for one in (inputs, weights[:, :3], outputs[:TILE].contiguous())]
    return _Constants(*both)


def _times(polynomial: list[float], root: float) -> list[float]:
    """polynomial(x) * (x - root), lowest power first."""
    shifted = [0.0, *polynomial]
    return [high - root * low for high, low in zip(shifted, [*polynomial, 0.0], strict=True)]
