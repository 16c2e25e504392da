"""DINOv2 as an extractor, for the FD-DINOv2: a distance that follows human judgement more closely than Inception's."""

from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from fid.features import fingerprint, ieee_float32
from fid.images import check_uint8

SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


class DINOv2(nn.Module):
    """The class token of DINOv2's ViT-L/14, 1024 features, of images at 224 x 224 pixels.

    Images are resized (bicubic, antialiased, rounded to uint8) and normalised by ImageNet's mean and deviation. The
    network is timm's; `pip install timm`.

    Args:
        weights: Local file of weights, .safetensors or .pth, with timm's keys; not given means timm's from the Hugging
            Face hub (1.2 GB).
        model_name: timm's name of the network.

    Raises:
        FileNotFoundError: No such file, or it cannot be had from the hub.
        ValueError: timm is missing, or the file holds something else.

    Source: Oquab et al., arXiv:2304.07193; as a distance, Stein et al., arXiv:2306.04675.
    """

    label, preset, metrics = "FD-DINOv2", None, ("fd",)

    def __init__(self, weights: str | Path | None = None, model_name: str = "vit_large_patch14_dinov2.lvd142m") -> None:
        super().__init__()
        try:
            import timm
        except ImportError as error:
            raise ValueError("the extractor dinov2 needs timm; run `pip install timm`.") from error
        if weights is not None and not Path(weights).is_file():
            raise FileNotFoundError(f"DINOv2's weights '{weights}' do not exist.")
        source = {"checkpoint_path": str(weights)} if weights is not None else {}
        try:
            self.network = timm.create_model(
                model_name, pretrained=weights is None, img_size=SIZE, num_classes=0, global_pool="token", **source
            )
        except (RuntimeError, SafetensorError, EOFError, KeyError, ValueError) as error:
            if weights is None:
                raise _offline(model_name, error) from error
            reason = str(error).splitlines()[0].rstrip(":")
            raise ValueError(f"'{weights}' does not hold {model_name} with timm's keys: {reason}.") from error
        except OSError as error:
            raise _offline(model_name, error) from error
        self.dim = self.network.num_features
        self.dims = {"features": self.dim}
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)
        self.name = f"dinov2-{fingerprint(self)}"
        self.requires_grad_(False).eval()

    @ieee_float32()
    def forward(self, images: Tensor | list[Tensor]) -> dict[str, Tensor]:
        """uint8 (B, 3, H, W), or a list of (3, H, W), -> features (B, 1024)."""
        parts = [image[None] for image in images] if isinstance(images, list) else [images]
        resized = []
        for part in parts:
            check_uint8(part)
            resized.append(resize(part, [SIZE, SIZE], InterpolationMode.BICUBIC, antialias=True))
        x = (torch.cat(resized).float() / 255 - self.mean) / self.std  # (B, 3, 224, 224)
        return {"features": self.network(x)}

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode."""
        return super().train(False)


def _offline(model_name: str, error: Exception) -> FileNotFoundError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return FileNotFoundError(
        f"the weights of {model_name} cannot be had from the Hugging Face hub ({reason}). Download them on a machine with "
        "internet (timm's model.safetensors) and pass --weights."
    )
