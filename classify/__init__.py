"""Recognition: DeiT, PVT, Swin and CSwin, each with its own attention or any of `vca.ATTENTIONS`.

DeiT and Swin are timm's, so this package needs timm: `pip install "vca-diffusion[classify]"`.
"""

try:
    import timm as _timm  # noqa: F401
except ImportError as error:
    raise ImportError("classify needs timm; run `pip install timm`.") from error

from classify.cswin import CSwin
from classify.models import MODELS, create
from classify.pvt import PVT
from classify.swap import swap_attention

__all__ = ["MODELS", "PVT", "CSwin", "create", "swap_attention"]
