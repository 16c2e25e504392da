"""Flow: SiT, its paths, predictions, training loss, and samplers. Time runs from noise at t = 0 to data at t = 1.

That is the direction of SiT's released code and weights; its paper (arXiv:2401.08740) writes the reverse.
"""

from sit_vca.model import SiT
from sit_vca.path import PATHS, Coefficients, Path
from sit_vca.prediction import PREDICTIONS, WEIGHTS
from sit_vca.sampler import DIFFUSION_FORMS, LAST_STEPS, ODE, SAMPLERS, SDE
from sit_vca.transport import TIMES, Transport

__all__ = [
    "DIFFUSION_FORMS",
    "LAST_STEPS",
    "ODE",
    "PATHS",
    "PREDICTIONS",
    "SAMPLERS",
    "SDE",
    "TIMES",
    "WEIGHTS",
    "Coefficients",
    "Path",
    "SiT",
    "Transport",
]
