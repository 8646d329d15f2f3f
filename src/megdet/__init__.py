"""MegDet: a trainer for object detectors with large mini-batches.

You choose the mini-batch and the BN size, counted in images; MegDet fits them to whatever devices you have, and the
result does not depend on the devices. After Peng et al., "MegDet: A Large Mini-Batch Object Detector", CVPR 2018.
"""

__version__ = "0.1.0"
