"""The network of diffusion models."""

from collections.abc import Mapping
from typing import Any, Self

from huggingface_hub import PyTorchModelHubMixin

from vca import Transformer, before_joint


class DiT(
    Transformer,
    PyTorchModelHubMixin,
    library_name="vca-diffusion",
    coders={Mapping: (dict, dict)},  # of any mapping, a dict goes into config.json
    paper_url="https://arxiv.org/abs/2212.09748",
    tags=["class-conditional", "image-generation", "diffusion", "dit", "visual-contrast-attention"],
):
    """`Transformer` with 2C output channels: the noise, and v, which places the variance inside its range.

    Args:
        in_channels: Channels C of the latents.
        **backbone: The other keywords of `vca.Transformer`.

    `save_pretrained(folder)` writes the keywords that were given, which so have to be plain values, as config.json, and
    the weights as model.safetensors; `from_pretrained(folder or name)` builds the model of them, `push_to_hub(name)`
    shares it.

    Source: Peebles & Xie 2023, arXiv:2212.09748; Nichol & Dhariwal 2021, arXiv:2102.09672, equation 15.
    """

    def __init__(self, *, in_channels: int = 4, **backbone: Any) -> None:
        super().__init__(in_channels=in_channels, **{"out_channels": 2 * in_channels, **backbone})
        # config.json has every option, whatever becomes the default.
        self._hub_mixin_config["attention"] = self.attention

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **options: Any) -> Self:
        """Load as the mixin does, but refuse a file that lacks a tensor, and read files of before the joint softmax."""
        options["attention"] = before_joint(options.get("attention", "vca"))
        return super()._from_pretrained(strict=strict, **options)
