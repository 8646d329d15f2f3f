"""Cross-device batch norm and recompute, the paper's two systems ideas. The exported names work in any program."""

from megdet.layers.batch_norm import CrossDeviceBatchNorm
from megdet.layers.convert import convert_batch_norm

__all__ = ["CrossDeviceBatchNorm", "convert_batch_norm"]
