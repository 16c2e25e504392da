"""Diffusion: DiT, its betas and loss, and samplers on diffusers' schedulers. Time is an integer, 0 the cleanest."""

from dit_vca.diffusion import BETAS, Diffusion
from dit_vca.model import DiT
from dit_vca.sampler import DDIM, DDPM, SAMPLERS, DPMSolver, UniPC, respace

__all__ = [
    "BETAS",
    "DDIM",
    "DDPM",
    "SAMPLERS",
    "DPMSolver",
    "DiT",
    "Diffusion",
    "UniPC",
    "respace",
]
