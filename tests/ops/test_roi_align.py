import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops import roi_align as torchvision_roi_align

from factories import random_boxes, relative
from megdet.ops.roi_align import feature_table, roi_align, roi_levels

STRIDES = (4, 8, 16, 32)


def pyramid(images: int = 2, channels: int = 3, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Levels of a canvas of 96 x 64 pixels."""
    torch.manual_seed(0)
    return [torch.randn(images, channels, 96 // s, 64 // s, dtype=dtype, requires_grad=True) for s in STRIDES]


def awkward_rois(count: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Inside, across the border, outside, and of no size."""
    torch.manual_seed(1)
    special = [
        [-20.0, -30.0, 200.0, 150.0],
        [80.0, 100.0, 120.0, 130.0],
        [10.0, 10.0, 10.0, 10.0],
        [0.0, 0.0, 64.0, 96.0],
    ]
    return torch.cat([random_boxes(count - 4), torch.tensor(special)]).to(dtype)


def test_the_mean_of_a_constant_map_is_the_constant():
    table = feature_table([torch.full((1, 2, 8, 8), 3.0)])
    zero = torch.zeros(1, dtype=torch.int64)
    bins = roi_align(table, (4,), torch.tensor([[4.0, 4.0, 20.0, 24.0]]), zero, zero, 7, 2, aligned=True)
    assert bins.shape == (1, 49, 2)
    torch.testing.assert_close(bins, torch.full((1, 49, 2), 3.0))


def test_one_sample_in_the_middle_of_a_ramp_is_read_by_hand():
    ramp = torch.arange(8.0).reshape(1, 1, 1, 8).expand(1, 1, 8, 8) * torch.tensor([1.0, 10.0]).reshape(1, 2, 1, 1)
    zero = torch.zeros(1, dtype=torch.int64)
    # the middle of x from 8 to 16 is pixel 3 of stride 4; aligned, pixel centres stand half a pixel further
    box = torch.tensor([[8.0, 8.0, 16.0, 16.0]])
    for aligned, expected in ((False, 3.0), (True, 2.5)):
        bins = roi_align(feature_table([ramp]), (4,), box, zero, zero, 1, 1, aligned=aligned)
        torch.testing.assert_close(bins, torch.tensor([[[expected, 10 * expected]]]))


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize(("pool_size", "sampling_ratio"), [(7, 2), (3, 1), (2, 3), (7, 0), (2, 0)])
def test_values_and_gradients_equal_torchvisions_on_every_level(aligned, pool_size, sampling_ratio):
    levels = pyramid()
    rois = awkward_rois(24)
    image_index, level_index = torch.arange(24) % 2, torch.arange(24) // 2 % 4
    ours = roi_align(
        feature_table(levels), STRIDES, rois, image_index, level_index, pool_size, sampling_ratio, aligned=aligned
    )
    theirs = torch.zeros_like(ours)
    for level, (features, stride) in enumerate(zip(levels, STRIDES, strict=True)):
        own = level_index == level
        pooled = torchvision_roi_align(
            features,
            torch.cat([image_index[own, None].double(), rois[own]], 1),
            pool_size,
            1 / stride,
            sampling_ratio,
            aligned,
        )
        theirs = theirs.index_put((own.nonzero().flatten(),), pooled.flatten(2).transpose(1, 2))
    assert relative(theirs, ours) < 1e-12
    upstream = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(theirs, levels, upstream), torch.autograd.grad(ours, levels, upstream), strict=True
    ):
        assert relative(a, b) < 1e-12


def test_a_pyramid_is_pooled_as_torchvision_pools_it():
    levels = [level.detach().float() for level in pyramid(channels=2)]
    torch.manual_seed(2)
    corner = torch.rand(60, 2) * 20
    rois = torch.cat([corner, corner + 4 + 70 * torch.rand(60, 2)], 1).reshape(2, 30, 4)
    reference = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2, canonical_scale=28)
    sizes = ImageList(torch.zeros(2, 3, 96, 64), [(96, 64)] * 2).image_sizes
    theirs = reference({str(i): level for i, level in enumerate(levels)}, list(rois), sizes).flatten(2).transpose(1, 2)
    flat = rois.reshape(-1, 4)
    level_index = roi_levels(flat, 4, 28.0)
    assert len(level_index.unique()) == 4
    table = feature_table(levels)
    ours = roi_align(table, STRIDES, flat, torch.arange(2).repeat_interleave(30), level_index, 7, 2, aligned=False)
    assert relative(theirs, ours) < 1e-5


@pytest.mark.parametrize(
    ("edge", "level"), [(1.0, 0), (111.9, 0), (112.0, 1), (223.9, 1), (224.0, 2), (448.0, 3), (9e3, 3)]
)
def test_the_level_of_a_roi_follows_its_size(edge, level):
    assert int(roi_levels(torch.tensor([[10.0, 10.0, 10.0 + edge, 10.0 + edge]]), 4, 224.0)) == level


def test_a_roi_without_area_goes_to_the_finest_level():
    assert roi_levels(torch.tensor([[5.0, 5.0, 5.0, 9.0], [5.0, 5.0, 5.0, 5.0]]), 4, 224.0).tolist() == [0, 0]


def test_the_gradient_is_the_derivative():
    levels = [level.detach()[:, :2, :3, :4].requires_grad_() for level in pyramid(images=1)][:2]
    rois, zeros = awkward_rois(6), torch.zeros(6, dtype=torch.int64)

    def pooled(*features: torch.Tensor) -> torch.Tensor:
        return roi_align(feature_table(features), (4, 8), rois, zeros, torch.arange(6) % 2, 2, 2, aligned=True)

    assert torch.autograd.gradcheck(pooled, tuple(levels))


def test_the_table_holds_every_pixel_behind_a_row_of_zeros():
    levels = pyramid(dtype=torch.float32)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        table = feature_table([level.contiguous(memory_format=memory_format) for level in levels])
        assert table.rows[0].eq(0).all()
        for level, features in enumerate(levels):
            height, width = table.heights[level], table.widths[level]
            for image, y, x in ((0, 0, 0), (1, height - 1, width - 1), (1, height // 2, 0)):
                row = table.starts[level] + (image * height + y) * width + x
                assert torch.equal(table.rows[row], features[image, :, y, x])
        assert table.rows.shape == (1 + sum(level[:, 0].numel() for level in levels), 3)


@given(st.lists(st.integers(0, 24), min_size=1, max_size=40))
def test_taken_rows_add_their_gradient_to_that_of_later_readers(index):
    levels = [torch.randn(1, 3, 4, 6, dtype=torch.float64, requires_grad=True)]
    places, weights = torch.tensor(index), torch.randn(len(index), 3, dtype=torch.float64)
    later = torch.randn(25, 3, dtype=torch.float64)
    plain = feature_table(levels).rows
    (expected,) = torch.autograd.grad((plain[places] * weights).sum() + (plain * later).sum(), levels)
    (of_taken,) = torch.autograd.grad((feature_table(levels).rows[places] * weights).sum(), levels)
    table = feature_table(levels)
    taken = table.take(places)
    assert torch.equal(taken, plain[places])
    (ours,) = torch.autograd.grad((taken * weights).sum() + (table.rows * later).sum(), levels)
    torch.testing.assert_close(ours, expected)
    (alone,) = torch.autograd.grad((feature_table(levels).take(places) * weights).sum(), levels)
    torch.testing.assert_close(alone, of_taken)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "box",
    [
        *([NAN if i == place else 20.0 + 4 * i for i in range(4)] for place in range(4)),
        *([INF if i == place else 20.0 + 4 * i for i in range(4)] for place in range(4)),
        *([-INF if i == place else 20.0 + 4 * i for i in range(4)] for place in range(4)),
        [NAN] * 4,
        [-INF, -INF, INF, INF],
        [1e30, 1e30, 2e30, 2e30],
        [-3e38, -3e38, 3e38, 3e38],
    ],
    ids=str,
)
def test_a_box_that_is_not_finite_or_far_too_large_pools_zeros_and_leaves_its_neighbours_alone(box, dtype):
    levels = pyramid(dtype=dtype)
    good = awkward_rois(6, dtype)
    rois = torch.cat([good[:2], torch.tensor([box], dtype=dtype), good[2:]])
    image_index, kept = torch.arange(7) % 2, torch.tensor([0, 1, 3, 4, 5, 6])
    for aligned in (False, True):

        def pool(boxes: torch.Tensor, image_index: torch.Tensor, aligned: bool = aligned) -> torch.Tensor:
            on_level = roi_levels(boxes, 4, 40.0)
            assert ((on_level >= 0) & (on_level < 4)).all()
            return roi_align(feature_table(levels), STRIDES, boxes, image_index, on_level, 7, 2, aligned=aligned)

        bins = pool(rois, image_index)
        assert bins[2].eq(0).all()
        expected = pool(good, image_index[kept])
        assert torch.equal(bins[kept], expected)
        gradients = (torch.autograd.grad(pooled.sum(), levels) for pooled in (bins, expected))
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("images", [0, 2])
def test_no_rois_pool_to_nothing_and_leave_gradients_of_zero(images):
    levels = pyramid(images=images)
    none = torch.zeros(0, dtype=torch.int64)
    bins = roi_align(feature_table(levels), STRIDES, torch.zeros(0, 4), none, none, 7, 2, aligned=True)
    assert bins.shape == (0, 49, 3)
    for gradient, level in zip(torch.autograd.grad(bins.sum(), levels), levels, strict=True):
        assert gradient.shape == level.shape
        assert gradient.eq(0).all()


def test_the_gradient_has_one_order_of_summation():
    levels = pyramid(dtype=torch.float32)
    rois = awkward_rois(200, torch.float32)
    image_index, level_index = torch.arange(200) % 2, roi_levels(rois, 4, 40.0)

    def once() -> tuple[torch.Tensor, ...]:
        bins = roi_align(feature_table(levels), STRIDES, rois, image_index, level_index, 7, 2, aligned=True)
        return torch.autograd.grad((bins * bins).sum(), levels)

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


def test_bfloat16_features_are_pooled_within_their_precision():
    levels = [level.detach() for level in pyramid(dtype=torch.float32)]
    rois = awkward_rois(40, torch.float32)
    image_index, level_index = torch.arange(40) % 2, roi_levels(rois, 4, 40.0)
    exact = roi_align(feature_table(levels), STRIDES, rois, image_index, level_index, 7, 2, aligned=True)
    half = [level.bfloat16().requires_grad_() for level in levels]
    rough = roi_align(feature_table(half), STRIDES, rois, image_index, level_index, 7, 2, aligned=True)
    assert rough.dtype == torch.bfloat16
    assert relative(exact, rough.detach().float()) < 0.02
    rough.float().square().sum().backward()
    assert all(level.grad is not None and level.grad.isfinite().all() for level in half)
