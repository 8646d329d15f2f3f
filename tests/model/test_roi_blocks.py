import torch
from torch import nn
from torch.nn import functional as F

from megdet.distributed.world import World
from megdet.layers.batch_norm import finish_step
from megdet.layers.convert import norm_factory
from megdet.model.roi_blocks import Inception


def test_an_inception_block_is_four_branches_of_plain_convolutions_side_by_side():
    torch.manual_seed(0)
    block = Inception(6, 8, norm_factory("none"), bias=True)
    maps = torch.randn(5, 6, 7, 7)
    found = block(maps, torch.ones(1, 5, dtype=torch.bool))
    kernels = [[own[0].kernel_size[0] for own in branch] for branch in block.branches]
    assert kernels == [[1], [1, 3], [1, 3, 3], [1]]

    def through(branch: nn.ModuleList, hidden: torch.Tensor) -> torch.Tensor:
        for convolution, _ in branch:
            edge = (convolution.kernel_size[0] - 1) // 2
            hidden = F.conv2d(F.pad(hidden, [edge] * 4), convolution.weight, convolution.bias).clamp(min=0)
        return hidden

    around = F.pad(maps, [1] * 4).unfold(2, 3, 1).unfold(3, 3, 1).sum((4, 5))
    inside = F.pad(torch.ones(1, 1, 7, 7), [1] * 4).unfold(2, 3, 1).unfold(3, 3, 1).sum((4, 5))  # 4, 6 or 9 pixels
    wanted = [through(branch, maps) for branch in block.branches[:3]]
    torch.testing.assert_close(found, torch.cat([*wanted, through(block.branches[3], around / inside)], 1))
    assert found.shape == (5, 8, 7, 7)


def test_padded_rois_stay_out_of_all_its_statistics():
    maps = torch.randn(9, 6, 3, 3)
    maps[6:] *= 1000
    found = []
    for count in (9, 6):
        torch.manual_seed(0)
        block = Inception(6, 8, norm_factory("batch"), bias=False)
        hidden = block(maps[:count], torch.arange(count).unsqueeze(0) < 6)[:6]
        finish_step(block.modules(), 1, World(0, 1, torch.device("cpu")))
        found.append((block.state_dict(), hidden))
    torch.testing.assert_close(found[0], found[1])
    assert sum(name.endswith("running_mean") and own.ne(0).any() for name, own in found[0][0].items()) == 7
