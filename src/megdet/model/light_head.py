"""The light head (Light-Head R-CNN, Li et al., 2017): a thin map from a large kernel, pooling, one hidden layer."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from megdet.architecture_heads import PositionSensitiveHead as HeadRecipe
from megdet.layers.convert import NormFactory
from megdet.model.large_kernel import GlobalConvolution
from megdet.model.pooling import PositionSensitivePooling
from megdet.model.roi_head import RoiHead
from megdet.ops.linear import linear


class LightHead(RoiHead):
    """A large separable convolution for the image; for each RoI a fully connected layer and two predicting layers.

    Each bin of a RoI has a few channels of its own, bin after bin (Sec. 3.1 and 3.2). Differs from the paper: pooling
    is the mean of bilinear samples, as in `PositionSensitivePooling`.
    """

    recipe: HeadRecipe

    def __init__(self, recipe: HeadRecipe, in_channels: int, stride: int, num_classes: int, norm: NormFactory) -> None:
        super().__init__(recipe, num_classes, is_class_agnostic=True)
        self.pooling = PositionSensitivePooling(recipe.pool_size, recipe.sampling_ratio, stride)
        thin = recipe.thin_channels * recipe.pool_size**2
        bias = recipe.norm == "none"
        self.conv = GlobalConvolution(in_channels, recipe.light_channels, thin, recipe.light_kernel, bias=bias)
        self.norm = norm(thin)
        self.fc = nn.Linear(thin, recipe.layer_channels)
        self.classes = nn.Linear(recipe.layer_channels, num_classes + 1)
        self.deltas = nn.Linear(recipe.layer_channels, 4)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_uniform_(module.weight, a=1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.classes.weight, std=0.01)
        nn.init.normal_(self.deltas.weight, std=0.001)

    def forward(self, features: Float[Tensor, "images _ _ _"]) -> list[Float[Tensor, "images _ _ _"]]:
        """The thin map."""
        return [F.relu(self.norm(self.conv(features)))]

    def vote(
        self, maps: list[Float[Tensor, "images _ _ _"]], rois: Float[Tensor, "images rois 4"]
    ) -> tuple[Float[Tensor, "images rois classes_and_background"], Float[Tensor, "images rois 1 4"]]:
        """Class logits, background last, and deltas of all classes together."""
        images, count = rois.shape[:2]
        hidden = F.relu(linear(self.pooling(maps[0], rois).flatten(1), self.fc.weight, self.fc.bias))
        logits, deltas = self.classes(hidden).to(rois.dtype), self.deltas(hidden).to(rois.dtype)
        return logits.reshape(images, count, self.num_classes + 1), deltas.reshape(images, count, 1, 4)
