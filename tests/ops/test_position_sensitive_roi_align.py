import pytest
import torch
from torchvision.ops import ps_roi_align

from factories import random_boxes, relative
from megdet.ops.roi_align import position_sensitive_roi_align


def maps_of(bins: int, channels: int = 2, images: int = 2, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Maps of stride 16 for a canvas of 160 x 128 pixels."""
    torch.manual_seed(0)
    return torch.randn(images, bins * channels, 10, 8, dtype=dtype, requires_grad=True)


def rois_of(count: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Inside, across the border and of no size, and their images."""
    torch.manual_seed(1)
    special = torch.tensor([[-40.0, -30.0, 300.0, 250.0], [10.0, 20.0, 10.0, 20.0]])
    return torch.cat([random_boxes(count - 2, canvas=120), special]).to(dtype), torch.arange(count) % 2


def test_each_bin_reads_its_own_channels_by_hand():
    values = torch.arange(1.0, 9.0)  # four bins of two channels
    maps = values.reshape(1, 8, 1, 1).expand(1, 8, 4, 4)
    zero = torch.zeros(1, dtype=torch.int64)
    found = position_sensitive_roi_align(maps, 16, torch.tensor([[8.0, 8.0, 40.0, 40.0]]), zero, 2, 2)
    assert found.tolist() == [[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]]


def test_one_sample_of_a_ramp_is_read_by_hand():
    ramp = torch.arange(8.0).expand(1, 4, 8, 8) * torch.tensor([1.0, 10.0, 100.0, 1000.0]).reshape(1, 4, 1, 1)
    zero = torch.zeros(1, dtype=torch.int64)
    # bins of two pixels: their middles are 1 and 3 of the edges, half a pixel less of the centres
    found = position_sensitive_roi_align(ramp, 16, torch.tensor([[0.0, 0.0, 64.0, 64.0]]), zero, 2, 1)
    assert found.flatten().tolist() == [0.5, 25.0, 50.0, 2500.0]


@pytest.mark.parametrize(("pool_size", "sampling_ratio"), [(7, 2), (3, 1), (3, 2)])
def test_values_and_gradients_equal_torchvisions(pool_size, sampling_ratio):
    bins = pool_size**2
    maps = maps_of(bins)
    rois, image_index = rois_of(16)
    ours = position_sensitive_roi_align(maps, 16, rois, image_index, pool_size, sampling_ratio)
    their_maps = maps.unflatten(1, (bins, 2)).transpose(1, 2).flatten(1, 2)
    joined = torch.cat([image_index.unsqueeze(1), rois], 1)
    theirs = ps_roi_align(their_maps, joined, pool_size, 1 / 16, sampling_ratio)
    theirs = theirs.flatten(2).transpose(1, 2)
    assert relative(theirs, ours) < 1e-12
    (weights,) = torch.randn(1, *ours.shape, dtype=ours.dtype)
    found = [torch.autograd.grad(pooled, maps, weights, retain_graph=True)[0] for pooled in (theirs, ours)]
    assert relative(*found) < 1e-12


def test_the_gradient_is_the_derivative():
    maps = maps_of(4, 1).detach()[:1, :, :4, :4].requires_grad_()
    rois = torch.tensor([[3.0, 5.0, 50.0, 41.0], [-9.0, 2.0, 30.0, 70.0]], dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.int64)
    assert torch.autograd.gradcheck(lambda m: position_sensitive_roi_align(m, 16, rois, zero, 2, 2), (maps,))


@pytest.mark.parametrize("images", [0, 2])
def test_no_rois_pool_to_nothing_and_leave_gradients_of_zero(images):
    maps = maps_of(9, images=images)
    rois, image_index = rois_of(2)
    found = position_sensitive_roi_align(maps, 16, rois[:0], image_index[:0], 3, 2)
    assert found.shape == (0, 9, 2)
    found.sum().backward()
    assert maps.grad is not None
    assert maps.grad.eq(0).all()


def test_other_rois_between_them_do_not_change_the_order_in_which_gradients_are_added():
    maps = maps_of(9, dtype=torch.float32)
    rois, image_index = rois_of(40, torch.float32)
    weights = torch.randn(40, 9, 2)
    weights[1::2] = 0.0  # the RoIs of the second image

    def gradient(some: slice) -> torch.Tensor:
        pooled = position_sensitive_roi_align(maps, 16, rois[some], image_index[some], 3, 2)
        return torch.autograd.grad(pooled, maps, weights[some])[0]

    assert torch.equal(gradient(slice(0, None, 2)), gradient(slice(None)))


def test_bfloat16_maps_are_pooled_within_their_precision():
    maps = maps_of(9, dtype=torch.float32)
    rois, image_index = rois_of(12, torch.float32)
    exact = position_sensitive_roi_align(maps, 16, rois, image_index, 3, 2)
    half = position_sensitive_roi_align(maps.bfloat16(), 16, rois, image_index, 3, 2)
    assert half.dtype == torch.bfloat16
    assert relative(exact, half.float()) < 0.02
    (gradient,) = torch.autograd.grad(half.float().sum(), maps)
    assert relative(torch.autograd.grad(exact.sum(), maps)[0], gradient) < 0.02


def test_a_roi_that_is_not_finite_pools_zeros():
    rois = torch.tensor([[0.0, float("nan"), 50.0, 60.0], [0.0, 0.0, float("inf"), 60.0]], dtype=torch.float64)
    found = position_sensitive_roi_align(maps_of(9), 16, rois, torch.zeros(2, dtype=torch.int64), 3, 2)
    assert found.eq(0).all()
