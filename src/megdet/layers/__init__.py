"""Cross-device batch norm and recompute, the paper's two systems ideas. The names below are for any program."""

from megdet.layers.batch_norm import CrossDeviceBatchNorm
from megdet.layers.convert import convert_batch_norm

__all__ = ["CrossDeviceBatchNorm", "convert_batch_norm"]
