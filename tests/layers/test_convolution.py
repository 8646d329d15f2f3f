import pytest
import torch
from torch import nn

from factories import relative
from megdet.layers.convolution import (
    LEAST_CHANNELS,
    LEAST_TILES,
    Convolution3x3,
    convolved_levels,
    speed_up_convolutions,
)
from megdet.ops.winograd import num_tiles

WIDE = LEAST_CHANNELS


def wide_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, WIDE, 1), nn.Conv2d(WIDE, WIDE, 3, padding=1), nn.Conv2d(WIDE, WIDE, 3, padding=1, bias=False)
    )


def test_the_exchange_keeps_parameters_names_and_results():
    model = wide_model().to(memory_format=torch.channels_last)
    before, names = list(model.parameters()), list(model.state_dict())
    images = torch.rand(2, 3, 24, 20).to(memory_format=torch.channels_last)
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
        nn.Conv2d(WIDE, WIDE, 1),
        nn.Conv2d(WIDE // 2, WIDE, 3, padding=1),
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


def test_levels_count_together():
    plain = nn.Conv2d(WIDE, WIDE, 3, padding=1)
    layer = Convolution3x3(plain)
    levels = [torch.rand(1, WIDE, edge, edge) for edge in (20, 16, 8, 4, 2)]
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
