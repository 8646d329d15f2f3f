import pytest
import torch

from megdet.architecture_heads import REGIONS, BoxHead
from megdet.bounds import faults_of
from megdet.model.regions import region_boxes

ROI = [10.0, 20.0, 30.0, 60.0]
WANTED = {
    "left": [10.0, 20.0, 20.0, 60.0],
    "right": [20.0, 20.0, 30.0, 60.0],
    "upper": [10.0, 20.0, 30.0, 40.0],
    "lower": [10.0, 40.0, 30.0, 60.0],
    "center": [15.0, 30.0, 25.0, 50.0],
    "enlarged": [2.0, 4.0, 38.0, 76.0],
}


@pytest.mark.parametrize("name", REGIONS)
def test_a_region_lies_where_its_name_says_and_ends_at_the_image(name):
    rois = torch.tensor([[ROI, [0.0, 0.0, 0.0, 0.0]]] * 2)
    found = region_boxes(name, rois, torch.tensor([[100, 100], [70, 25]]))
    torch.testing.assert_close(found[0, 0], torch.tensor(WANTED[name]))
    x1, y1, x2, y2 = WANTED[name]
    torch.testing.assert_close(found[1, 0], torch.tensor([x1, y1, min(x2, 25.0), min(y2, 70.0)]))
    assert found[:, 1].eq(0).all()


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({"regions": ("left", "middle")}, "regions"),
        ({"regions": ("left", "left")}, "regions"),
        ({"block": "inception"}, "block"),
        ({"block": "inception", "convolutions": 1, "convolution_channels": 30}, "convolution_channels"),
    ],
)
def test_structures_that_cannot_be_are_refused(keys, fault):
    assert [key for key, _ in faults_of(BoxHead(**keys))] == [fault]
    assert not [*faults_of(BoxHead(block="inception", convolutions=1, convolution_channels=32, regions=REGIONS))]
