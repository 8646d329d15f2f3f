"""The second stage of R-FCN (Dai et al., 2016): each bin of a RoI has its own maps; a RoI averages over bins."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from megdet.architecture_heads import PositionSensitiveHead as HeadRecipe
from megdet.layers.convert import NormFactory
from megdet.model.pooling import PositionSensitivePooling
from megdet.model.roi_head import RoiHead


class PositionSensitiveHead(RoiHead):
    """Three 1 x 1 convolutions for the whole image; the work for each RoI has no weights.

    `classes` has for each bin a map for every class and the background, `deltas` four maps for all classes together;
    the maps are ordered bin after bin.
    """

    recipe: HeadRecipe

    def __init__(self, recipe: HeadRecipe, in_channels: int, stride: int, num_classes: int, norm: NormFactory) -> None:
        super().__init__(recipe, num_classes, is_class_agnostic=True)
        self.pooling = PositionSensitivePooling(recipe.pool_size, recipe.sampling_ratio, stride)
        bins = recipe.pool_size**2
        self.conv = nn.Conv2d(in_channels, recipe.channels, 1, bias=recipe.norm == "none")
        self.norm = norm(recipe.channels)
        self.classes = nn.Conv2d(recipe.channels, bins * (num_classes + 1), 1)
        self.deltas = nn.Conv2d(recipe.channels, bins * 4, 1)
        nn.init.kaiming_uniform_(self.conv.weight, a=1)
        for layer in (self.classes, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
        for layer in (self.conv, self.classes, self.deltas):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, features: Float[Tensor, "images _ _ _"]) -> list[Float[Tensor, "images _ _ _"]]:
        """The maps of classes and of boxes."""
        hidden = F.relu(self.norm(self.conv(features)))
        return [self.classes(hidden), self.deltas(hidden)]

    def vote(
        self, maps: list[Float[Tensor, "images _ _ _"]], rois: Float[Tensor, "images rois 4"]
    ) -> tuple[Float[Tensor, "images rois classes_and_background"], Float[Tensor, "images rois 1 4"]]:
        """Class logits, background last, and deltas of all classes together: the means over the bins of each RoI."""
        images, count = rois.shape[:2]
        logits, deltas = (self.pooling(own, rois).mean(1, dtype=rois.dtype) for own in maps)
        return logits.reshape(images, count, self.num_classes + 1), deltas.reshape(images, count, 1, 4)
