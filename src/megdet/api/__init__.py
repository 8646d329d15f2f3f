"""What `import megdet` offers. Its names are loaded when they are first used, since torch takes seconds to load."""

from megdet.api.detector import LoadedDetector
from megdet.api.loading import load
from megdet.api.own_loop import ModuleRates, PlanSampler, module_groups, scaled_learning_rate
from megdet.api.runs import TrainedRun, evaluate, train
from megdet.api.torchvision_loop import TorchvisionLoop
from megdet.detections import Detections
from megdet.errors import InputError

__all__ = [
    "Detections",
    "InputError",
    "LoadedDetector",
    "ModuleRates",
    "PlanSampler",
    "TorchvisionLoop",
    "TrainedRun",
    "evaluate",
    "load",
    "module_groups",
    "scaled_learning_rate",
    "train",
]
