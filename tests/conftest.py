"""Settings of all tests."""

import torch
from hypothesis import settings

torch.set_num_threads(1)  # pytest runs two workers; more threads would only wait for each other

settings.register_profile("megdet", deadline=None, derandomize=True)  # a slow machine is no failure of a property
settings.load_profile("megdet")
