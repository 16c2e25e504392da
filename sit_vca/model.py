"""The network of flow models."""

from collections.abc import Mapping
from typing import Any, Self

from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor

from vca import Transformer, before_joint


class SiT(
    Transformer,
    PyTorchModelHubMixin,
    library_name="vca-diffusion",
    coders={Mapping: (dict, dict)},  # of any mapping, a dict goes into config.json
    paper_url="https://arxiv.org/abs/2401.08740",
    tags=["class-conditional", "image-generation", "flow-matching", "sit", "visual-contrast-attention"],
):
    """`Transformer` whose output has the shape of its input: a velocity, a noise or a score.

    Args:
        in_channels: Channels C of the latents.
        learn_sigma: Give the last layer 2C channels and drop the second half, as the published SiT does; only needed to
            load its weights.
        **backbone: The other keywords of `vca.Transformer`.

    `save_pretrained`, `from_pretrained` and `push_to_hub` as in `dit_vca.DiT`.

    Source: Ma et al. 2024, arXiv:2401.08740.
    """

    def __init__(self, *, in_channels: int = 4, learn_sigma: bool = False, **backbone: Any) -> None:
        out_channels = 2 * in_channels if learn_sigma else in_channels
        super().__init__(in_channels=in_channels, **{"out_channels": out_channels, **backbone})
        # config.json has every option, whatever becomes the default.
        self._hub_mixin_config["attention"] = self.attention

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict: x_t (B, C, H, W), t (B,) in [0, 1], y (B,) -> (B, C, H, W)."""
        return super().forward(x_t, t, y)[:, : self.in_channels]

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **options: Any) -> Self:
        """Load as the mixin does, but refuse a file that lacks a tensor, and read files of before the joint softmax."""
        options["attention"] = before_joint(options.get("attention", "vca"))
        return super()._from_pretrained(strict=strict, **options)
