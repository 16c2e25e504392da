"""Recognition: DeiT, PVT, Swin and CSwin, each with its own attention or any of `vca.ATTENTIONS`; and how they learn.

DeiT and Swin are timm's, so their networks need timm: `pip install "vca-diffusion[classify]"`. It is imported with the
first of them, since that is slow.
"""

from importlib import import_module
from typing import Any

from classify.process import Classification

HOMES = {
    **{"MODELS": "models", "create": "models", "PVT": "pvt", "CSwin": "cswin", "swap_attention": "swap"},
    "Recogniser": "recogniser",
}

__all__ = ["MODELS", "PVT", "CSwin", "Classification", "Recogniser", "create", "swap_attention"]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'classify' has no attribute {name!r}")
    try:
        import timm  # noqa: F401
    except ImportError as error:
        raise ImportError("classify needs timm; run `pip install timm`.") from error
    return getattr(import_module(f"classify.{HOMES[name]}"), name)
