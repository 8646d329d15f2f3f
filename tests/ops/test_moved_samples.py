import torch

from megdet.ops.moved_samples import moved_taps

PLAIN = {"kernel": (1, 1), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}


def offsets_of(y: float, x: float, size: tuple[int, int]) -> torch.Tensor:
    return torch.tensor([y, x]).reshape(1, 2, 1, 1).expand(1, 2, *size)


def test_a_quarter_of_a_pixel_weighs_its_four_neighbours_by_hand():
    index, weights = moved_taps(offsets_of(0.25, 0.5, (2, 3)), (4, 5), **PLAIN)
    assert index[0].tolist() == [0, 1, 5, 6]
    assert weights[0].tolist() == [0.375, 0.375, 0.125, 0.125]
    assert index[4].tolist() == [6, 7, 11, 12]  # the second column of the second row


def test_what_lies_outside_the_map_weighs_nothing_and_has_an_index_inside():
    for y in (-0.75, -30.0, 3.25, 1e9, -1e9, float("inf"), float("-inf")):
        index, weights = moved_taps(offsets_of(y, 0.0, (1, 1)), (4, 5), **PLAIN)
        assert index.min() >= 0
        assert index.max() < 20
        assert weights.sum().item() == {-0.75: 0.25, 3.25: 0.75}.get(y, 0.0)


def test_a_point_moved_by_no_number_has_no_numbers_as_weights():
    index, weights = moved_taps(offsets_of(float("nan"), 0.0, (1, 1)), (4, 5), **PLAIN)
    assert index.min() >= 0
    assert index.max() < 20
    assert weights.isnan().any()


def test_the_places_of_a_kernel_are_those_of_a_plain_convolution():
    size, shape = (7, 8), {"kernel": (3, 3), "stride": (2, 1), "padding": (2, 1), "dilation": (2, 1)}
    pixels = 1 + torch.arange(2 * 7 * 8, dtype=torch.float64).reshape(2, 1, 7, 8)
    columns = torch.nn.functional.unfold(pixels, (3, 3), dilation=(2, 1), padding=(2, 1), stride=(2, 1))
    index, weights = moved_taps(torch.zeros(2, 18, 4, 8, dtype=torch.float64), size, **shape)
    found = (pixels.flatten()[index] * weights).sum(1).reshape(2, 4, 3, 8, 3)  # image, row, point, column, point
    assert torch.equal(found.permute(0, 2, 4, 1, 3).flatten(1, 2).flatten(2), columns)
