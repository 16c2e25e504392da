"""The network of diffusion models."""

from typing import Any

from vca import Transformer


class DiT(Transformer):
    """`Transformer` with 2C output channels: the noise, and v, which places the variance inside its range.

    Args:
        in_channels: Channels C of the latents.
        **backbone: The other keywords of `vca.Transformer`.

    Source: Peebles & Xie 2023, arXiv:2212.09748; Nichol & Dhariwal 2021, arXiv:2102.09672, equation 15.
    """

    def __init__(self, *, in_channels: int = 4, **backbone: Any) -> None:
        super().__init__(in_channels=in_channels, **{"out_channels": 2 * in_channels, **backbone})
