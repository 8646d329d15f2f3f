import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from factories import needs_onednn, relative
from megdet.layers import convolution
from megdet.layers.batch_norm import CrossDeviceBatchNorm
from megdet.layers.convolution import (
    LEAST_CHANNELS,
    LEAST_TILES,
    Convolution1x1,
    Convolution3x3,
    DilatedGroupConvolution,
    convolved_levels,
    speed_up_convolutions,
)
from megdet.layers.recomputed_outputs import Output, recompute_outputs
from megdet.ops.winograd import num_tiles

WIDE = LEAST_CHANNELS


def wide_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, WIDE, 3, padding=1),
        nn.Conv2d(WIDE, WIDE, 3, padding=1),
        nn.Conv2d(WIDE, WIDE, 3, padding=1, bias=False),
    )


def test_the_exchange_keeps_parameters_names_and_results():
    model = wide_model().to(memory_format=torch.channels_last)
    before, names = list(model.parameters()), list(model.state_dict())
    images = torch.rand(3, 3, 32, 28).to(memory_format=torch.channels_last)
    assert len(images) * num_tiles(32, 28) >= LEAST_TILES
    expected = model(images)
    speed_up_convolutions(model)
    assert [type(layer) for layer in model] == [nn.Conv2d, Convolution3x3, Convolution3x3]
    assert all(old is new for old, new in zip(before, model.parameters(), strict=True))
    assert list(model.state_dict()) == names
    found = model(images)
    assert relative(expected, found) < 1e-5
    assert not torch.equal(expected, found)  # the other form has other roundings


@pytest.mark.parametrize(
    "plain",
    [
        nn.Conv2d(WIDE, WIDE, 3, padding=1, stride=2),
        nn.Conv2d(WIDE, WIDE, 3, padding=2, dilation=2),
        nn.Conv2d(WIDE, WIDE, 3, padding=0),
        nn.Conv2d(WIDE, WIDE, 3, padding="same"),
        nn.Conv2d(WIDE, WIDE, 3, padding=1, groups=2),
        nn.Conv2d(WIDE, WIDE, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(WIDE, WIDE, 5, padding=2),
        nn.Conv2d(WIDE, WIDE, 1, stride=2),
        nn.Conv2d(WIDE, WIDE, 1, padding=1),
        nn.Conv2d(WIDE, WIDE, 1, groups=2),
        nn.Conv2d(WIDE // 2, WIDE, 3, padding=1),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4, stride=2),
        nn.Conv2d(4, 4, 3, padding=1, dilation=2, groups=4),
        nn.Conv2d(4, 4, 2, padding=2, dilation=2, groups=4),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4, padding_mode="circular"),
    ],
)
def test_other_convolutions_stay(plain):
    model = nn.Sequential(plain)
    speed_up_convolutions(model)
    assert model[0] is plain


@pytest.mark.parametrize("case", ["small", "float64", "autocast"])
def test_where_it_is_not_faster_the_result_is_torchs_to_the_bit(case):
    plain = nn.Conv2d(WIDE, WIDE, 3, padding=1)
    images = torch.rand(1, WIDE, 8, 8) if case == "small" else torch.rand(LEAST_TILES, WIDE, 8, 8)
    if case == "float64":
        plain, images = plain.double(), images.double()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case == "autocast"):
        assert torch.equal(Convolution3x3(plain)(images), plain(images))


@pytest.mark.parametrize(("most", "is_plain"), [(1.2, True), (4.0, False)])
def test_maps_whose_tiles_cover_much_more_stay_plain_where_padding_costs_most(monkeypatch, most, is_plain):
    monkeypatch.setattr(convolution, "MOST_PADDED", most)
    plain = nn.Conv2d(WIDE, WIDE, 3, padding=1)
    images = torch.rand(LEAST_TILES, WIDE, 5, 5)  # four tiles of 16 pixels for 25
    assert torch.equal(Convolution3x3(plain)(images), plain(images)) == is_plain


def test_levels_count_together():
    plain = nn.Conv2d(WIDE, WIDE, 3, padding=1)
    layer = Convolution3x3(plain)
    levels = [torch.rand(1, WIDE, edge, edge) for edge in (48, 16, 8, 4, 2)]
    assert sum(num_tiles(*level.shape[2:]) for level in levels) > LEAST_TILES > num_tiles(2, 2)
    together, alone = convolved_levels(layer, levels), convolved_levels(plain, levels)
    for ours, theirs in zip(together, alone, strict=True):
        assert relative(theirs, ours) < 1e-5
    assert not torch.equal(together[-1], alone[-1])
    assert torch.equal(layer(levels[-1]), alone[-1])


def test_a_layer_that_is_used_twice_stays_one_layer():
    plain = nn.Conv2d(WIDE, WIDE, 3, padding=1)
    model = nn.ModuleDict({"first": plain, "second": plain})
    speed_up_convolutions(model)
    assert model["first"] is model["second"]
    assert isinstance(model["first"], Convolution3x3)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pointwise(monkeypatch, *, bias=True):
    """A 1 x 1 convolution and its copy in the other form, as on a processor on which that is faster."""
    monkeypatch.setattr(convolution, "onednn_is_faster", lambda: True)
    torch.manual_seed(0)
    plain = nn.Conv2d(24, 40, 1, bias=bias)
    model = nn.Sequential(copy.deepcopy(plain))
    parameters = list(model.parameters())
    speed_up_convolutions(model)
    assert type(model[0]) is Convolution1x1
    assert all(old is new for old, new in zip(parameters, model.parameters(), strict=True))
    return plain, model[0]


@needs_onednn
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_a_pointwise_convolution_is_torchs_in_output_and_gradients(monkeypatch, bias, memory_format):
    found = []
    images = torch.randn(3, 24, 7, 5).to(memory_format=memory_format)
    upstream = torch.randn(3, 40, 7, 5)
    for layer in pointwise(monkeypatch, bias=bias):
        x = images.clone(memory_format=torch.preserve_format).requires_grad_()
        y = F.relu_(layer(x))  # in place, as in the networks
        y.backward(upstream)
        found.append([y, x.grad, *(parameter.grad for parameter in layer.parameters())])
    for theirs, ours in zip(*found, strict=True):
        assert ours.shape == theirs.shape
        assert relative(theirs, ours) < 1e-5
    assert found[1][0].is_contiguous(memory_format=torch.channels_last)


@needs_onednn
@pytest.mark.usefixtures("one_thread")
def test_a_pointwise_convolution_is_a_product_only_where_torch_is_slow(monkeypatch):
    plain, layer = pointwise(monkeypatch)
    shapes = []
    monkeypatch.setattr(convolution, "convolve_1x1", lambda x, *_: shapes.append(tuple(x.shape)) or plain(x))
    few, many, none = (torch.rand(images, 24, 6, 6) for images in (15, 16, 0))
    layer(few)
    assert shapes == [(15, 24, 6, 6)]
    for images in (many, none):
        assert torch.equal(layer(images), plain(images))
    with pytest.raises(RuntimeError, match="size can't be greater than actual input size"):
        layer(few[:, :, :0])
    with pytest.raises(RuntimeError, match="to have 24 channels, but got 23"):
        layer(few[:, 1:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(few), plain(few))
    assert torch.equal(layer.double()(few.double()), plain.double()(few.double()))
    torch.set_num_threads(2)
    layer.float()(few)
    assert len(shapes) == 1


@needs_onednn
@pytest.mark.usefixtures("one_thread")
def test_a_pointwise_convolution_keeps_no_output_that_can_be_computed_again(monkeypatch):
    plain, layer = pointwise(monkeypatch)
    counts, gradients = [], []
    for own in (plain, layer):
        norm, kept = CrossDeviceBatchNorm(24), []
        images = torch.randn(2, 24, 6, 6, generator=torch.Generator().manual_seed(1))
        x = images.to(memory_format=torch.channels_last).requires_grad_()
        monkeypatch.setattr(Output, "keep", lambda self, keep=Output.keep, kept=kept: kept.append(self) or keep(self))
        with recompute_outputs():
            y = own(norm(x))
        monkeypatch.undo()
        y.square().sum().backward()
        counts.append(len(kept))
        gradients.append(x.grad)
    assert counts == [1, 1]
    assert relative(*gradients) < 1e-4


COMPILED = """
import copy, torch
from torch import nn
from megdet.layers import convolution

torch.set_num_threads(1)
convolution.onednn_is_faster = lambda: True
wide = convolution.LEAST_CHANNELS
layers = nn.Conv2d(3, wide, 3, padding=1), nn.Conv2d(wide, wide, 3, padding=1), nn.Conv2d(wide, 8, 1)
plain = nn.Sequential(*layers)
model = copy.deepcopy(plain)
convolution.speed_up_convolutions(model)
print(*(type(layer).__name__ for layer in model))
graphs = []
backend = lambda graph, _: graphs.append(graph) or graph.forward
compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
for edge in (8, 12, 60):
    images = torch.rand(2, 3, edge, edge)
    print(torch.equal(compiled(images), plain(images)), torch.equal(model(images), plain(images)))
print(len(graphs))
"""


@needs_onednn
def test_in_a_compiled_graph_convolutions_are_torchs_and_one_graph_serves_all_sizes():
    # a process without the checks of shapes, which torch cannot compile
    run = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=True)
    kinds, *sizes, graphs = run.stdout.splitlines()
    assert kinds == "Conv2d Convolution3x3 Convolution1x1"
    assert [line.split()[0] for line in sizes] == ["True"] * 3
    assert sizes[-1] == "True False"  # of which the last has tiles enough for Winograd's form
    assert graphs == "1"


def test_pointwise_convolutions_stay_where_torch_is_fast(monkeypatch):
    monkeypatch.setattr(convolution, "onednn_is_faster", lambda: False)
    plain = nn.Conv2d(24, 40, 1)
    model = nn.Sequential(plain)
    speed_up_convolutions(model)
    assert model[0] is plain


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 2)])
@pytest.mark.parametrize(
    "plain",
    [
        nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=6, bias=False),
        nn.Conv2d(6, 12, 5, padding=8, dilation=4, groups=3),
        nn.Conv2d(6, 6, (1, 3), padding=(0, 3), dilation=(2, 3), groups=2),
    ],
    ids=["depthwise", "groups", "oblong"],
)
def test_dilated_groups_side_by_side_give_the_same(plain, size):
    plain = plain.double()
    model = nn.Sequential(plain)
    speed_up_convolutions(model)
    assert type(model[0]) is DilatedGroupConvolution
    assert list(model[0].parameters()) == list(plain.parameters())
    images = torch.rand(2, 6, *size, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    expected, found = plain(images), model(images)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected)
    wanted = torch.rand_like(expected)
    inputs = [images, *plain.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, wanted), torch.autograd.grad(expected, inputs, wanted)
    )
    assert model(images[:0]).shape == expected[:0].shape


DIRTY = """
import torch
from torch import nn
from megdet.layers.convolution import speed_up_convolutions
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(384, 384, 3, padding=2, dilation=2, groups=384, bias=False))
speed_up_convolutions(model)
images = torch.randn(8, 384, 39, 52).to(memory_format=torch.channels_last)
with torch.autocast("cpu", dtype=torch.bfloat16):
    output = model(images)
output.backward(torch.ones_like(output))
print(float(model[0].weight.grad.abs().max()))
"""


def test_no_gradient_of_a_dilated_convolution_comes_from_memory_that_was_never_written():
    # with this setting the C library fills fresh memory with 0x7f, which reads as 3e38
    environment = {**os.environ, "MALLOC_PERTURB_": "128"}
    run = subprocess.run([sys.executable, "-c", DIRTY], env=environment, capture_output=True, text=True, check=True)
    assert float(run.stdout) < 1e4
