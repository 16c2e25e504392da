"""DINOv2 as an extractor, for the FD-DINOv2: a distance that follows human judgement more closely than Inception's."""

from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from fid.networks.extractor import FeatureExtractor
from vca_engine.images import uint8_batches
from vca_engine.precision import ieee_float32

SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


class DINOv2(FeatureExtractor):
    """The class token of DINOv2's ViT-L/14, 1024 features, of images at 224 x 224 pixels, as EDM2 computes it.

    Images are resized in floating point (bicubic, antialiased, neither rounded nor clipped) and normalised by
    ImageNet's mean and deviation; the embedding of 37 x 37 positions is resized to 16 x 16 as DINOv2's own code does
    it. The network is timm's; `pip install timm`.

    Args:
        weights: Local file of weights, .safetensors or .pth, with timm's keys or DINOv2's own; not given means timm's
            from the Hugging Face hub (1.2 GB).
        model_name: timm's name of the network.

    Raises:
        FileNotFoundError: No such file, or it cannot be had from the hub.
        ValueError: timm is missing, or the file holds something else.

    Source: Oquab et al., arXiv:2304.07193; as a distance, Stein et al., arXiv:2306.04675, and Karras et al.,
    arXiv:2312.02696.
    """

    label = "FD-DINOv2"

    def __init__(self, weights: str | Path | None = None, model_name: str = "vit_large_patch14_dinov2.lvd142m") -> None:
        super().__init__()
        try:
            import timm
        except ImportError as error:
            raise ValueError("the extractor dinov2 needs timm; run `pip install timm`.") from error
        state = None if weights is None else _read_weights(Path(weights))
        try:
            if state is None:
                _ask_hub(timm.get_pretrained_cfg(model_name).hf_hub_id)
            self.network = timm.create_model(model_name, pretrained=state is None, num_classes=0, global_pool="token")
        except (OSError, RuntimeError, ValueError) as error:
            raise FileNotFoundError(
                f"the weights of {model_name} cannot be had from the Hugging Face hub ({_first_line(error)}). Download "
                "them on a machine with internet (timm's model.safetensors) and pass --weights."
            ) from error
        if state is not None:
            try:
                self.network.load_state_dict({key: value for key, value in state.items() if key != "mask_token"})
            except (RuntimeError, AttributeError, TypeError) as error:
                raise ValueError(
                    f"'{weights}' does not hold {model_name} with timm's keys: {_first_line(error)}."
                ) from error
        position = self.network.pos_embed
        self.network.set_input_size(img_size=(SIZE, SIZE))
        self.network.pos_embed = nn.Parameter(_resize_positions(position, self.network.patch_embed.grid_size[0]))
        self.dims = {"features": self.network.num_features}
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    @ieee_float32()
    def forward(self, images: Tensor | list[Tensor]) -> dict[str, Tensor]:
        """Compute features (B, 1024) of uint8 (B, 3, H, W), or of a list of (3, H, W)."""
        resized = [
            F.interpolate(batch.float(), size=(SIZE, SIZE), mode="bicubic", antialias=True)
            for batch in uint8_batches(images)
        ]
        x = (torch.cat(resized) / 255 - self.mean) / self.std  # (B, 3, 224, 224)
        return {"features": self.network(x)}

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode."""
        return super().train(False)


def _resize_positions(embedding: Tensor, side: int) -> Tensor:
    """Resize (1, 1 + n n, D), of the class token and of n x n patches, to (1, 1 + side side, D), bicubic.

    DINOv2 resizes by (side + 0.1) / n and not by side / n, without antialiasing; timm does neither.
    """
    n = round((embedding.shape[1] - 1) ** 0.5)
    grid = embedding.detach()[:, 1:].unflatten(1, (n, n)).permute(0, 3, 1, 2)  # (1, D, n, n)
    grid = F.interpolate(grid, scale_factor=(side + 0.1) / n, mode="bicubic")
    return torch.cat([embedding.detach()[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"DINOv2's weights '{path}' do not exist.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # other formats make the unpickler raise almost anything
        raise ValueError(f"'{path}' is not a file of weights, or is cut short: {_first_line(error)}.") from error


def _ask_hub(repository: str | None) -> None:
    """Raise OSError if weights are neither in the cache nor on a hub that answers, for which timm waits a minute."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    file = "model.safetensors"
    if repository and not isinstance(try_to_load_from_cache(repository, file), str):
        try:
            get_hf_file_metadata(hf_hub_url(repository, file), timeout=10)
        except Exception as error:  # of whatever library the hub's client uses for its requests
            raise OSError(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(":.") if str(error) else type(error).__name__
