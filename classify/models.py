"""The recognisers by name, and where Visual-Contrast Attention stands in them.

    model = create("deit_tiny", attention="vca", num_classes=10)
    logits = model(images)  # (B, 3, 224, 224) -> (B, 10)

The paper's text does not say in which blocks VCA stands, nor how many contrast tokens it has there. The places and
grids here are inferred: with these, the Tiny models and DeiT-Small have the numbers of parameters that the paper
prints. The others have theirs by analogy.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import timm
from torch import Tensor, nn

from classify.block import DropPath, check_images
from classify.cswin import STRIPES, CSwin
from classify.pvt import PVT
from classify.swap import find_blocks, put_attention
from vca import ATTENTIONS, lookup, options_of
from vca import create as create_entry
from vca.transformer import resolved_attention


@dataclass(frozen=True)
class RecogniserKind:
    """A network, and where another attention than its own stands in it.

    Attributes:
        network: Makes it from `image_size`, `num_classes`, `in_channels` and `drop_path_rate`, with its own attention.
        stride: Pixels along the side of a token of the last stage.
        depths: Number of blocks of each stage, or of any runs of blocks.
        contrast: Of each stage, the side of the contrast grid; None where the blocks keep their own attention.
        windows: Of each stage, the side of the windows, or the width of the stripes, of the own attention.
        swapped: Options of `network` that go with another attention than its own.
    """

    network: Callable[..., nn.Module]
    stride: int
    depths: tuple[int, ...]
    contrast: tuple[int | None, ...]
    windows: tuple[float, ...] = ()
    swapped: Mapping[str, Any] = field(default_factory=dict)

    def changed(self, name: str, *, patch_size: int | None = None, depth: int | None = None, **widths: int) -> Self:
        """Change the sizes of a DeiT.

        Raises:
            ValueError: It is no DeiT, or a size does not fit; says what would.
        """
        given = {"patch_size": patch_size, "depth": depth, **widths}
        given = {option: value for option, value in given.items() if value is not None}
        if not given:
            return self
        if len(self.windows) or self.swapped:
            raise ValueError(f"{name} takes no {next(iter(given))}; only a deit_tiny, deit_small or deit_base does.")
        first = self.depths[:-1]
        if depth is not None and depth <= sum(first):
            raise ValueError(f"depth is {depth}; {name} has at least {sum(first) + 1} blocks.")
        names = {"hidden_size": "embed_dim"}  # of timm
        network = partial(self.network, **{names.get(option, option): value for option, value in given.items()})
        depths = self.depths if depth is None else (*first, depth - sum(first))
        return replace(self, network=network, stride=patch_size or self.stride, depths=depths)

    def fits(self, image_size: int, own: bool) -> bool:
        """Say whether the patches divide an image, and the windows or stripes that are left their map of tokens."""
        sides = [image_size // self.stride * 2**stage for stage in reversed(range(len(self.depths)))]
        stages = zip(sides, self.windows, self.contrast, strict=False)  # without windows there is nothing to divide
        left = (side % min(window, side) == 0 for side, window, grid in stages if own or grid is None)
        return image_size % self.stride == 0 and all(left)

    def sizes_near(self, image_size: int, own: bool) -> list[int]:
        """Give the next smaller and the next larger size that fit, or the larger only."""
        smaller = (size for size in range(image_size - 1, 0, -1) if self.fits(size, own))
        larger = (size for size in itertools.count(image_size + 1) if self.fits(size, own))
        return [*itertools.islice(smaller, 1), *itertools.islice(larger, 1)]


def _deit(size: str, depths: tuple[int, ...], contrast: tuple[int | None, ...]) -> RecogniserKind:
    return RecogniserKind(partial(_of_timm, f"deit_{size}_patch16_224"), 16, depths, contrast)


def _pvt(*depths: int) -> RecogniserKind:
    return RecogniserKind(partial(PVT, depths=depths), 32, depths, (3, 4, 7, 7), swapped={"class_token": False})


def _swin(size: str, *depths: int) -> RecogniserKind:
    network = partial(_of_timm, f"swin_{size}_patch4_window7_224")
    return RecogniserKind(network, 32, depths, (3, 4, 7, None), windows=(7, 7, 7, 7))


def _cswin(*depths: int) -> RecogniserKind:
    return RecogniserKind(partial(CSwin, depths=depths), 32, depths, (3, 4, None, None), windows=STRIPES)


def _of_timm(name: str, *, image_size: int, in_channels: int, **sizes: Any) -> nn.Module:
    network = timm.create_model(name, img_size=image_size, in_chans=in_channels, **sizes)
    network.patch_embed.register_forward_pre_hook(_check_inputs)
    return network


def _check_inputs(patch_embed: timm.layers.PatchEmbed, inputs: tuple[Tensor]) -> None:
    check_images(inputs[0], (patch_embed.proj.in_channels, *patch_embed.img_size))


MODELS = {
    "deit_tiny": _deit("tiny", (12,), (7,)),
    "deit_small": _deit("small", (12,), (7,)),
    "deit_base": _deit("base", (4, 8), (9, None)),
    "pvt_tiny": _pvt(2, 2, 2, 2),
    "pvt_small": _pvt(3, 4, 6, 3),
    "pvt_medium": _pvt(3, 4, 18, 3),
    "swin_tiny": _swin("tiny", 2, 2, 6, 2),
    "swin_small": _swin("small", 2, 2, 18, 2),
    "swin_base": _swin("base", 2, 2, 18, 2),
    "cswin_tiny": _cswin(2, 4, 18, 1),  # as the paper's base; the published CSWin-T has 1, 2, 21, 1
    "cswin_small": _cswin(2, 4, 32, 2),
}


def keep_own() -> None:
    """Stand for the network's own attention, which has no options here."""


ATTENTION_CHOICES = {"own": keep_own, **ATTENTIONS}


def create(
    name: str,
    attention: str | Mapping[str, Any] = "vca",
    *,
    num_classes: int = 1000,
    image_size: int = 224,
    in_channels: int = 3,
    drop_path_rate: float = 0.0,
    **changes: int,
) -> nn.Module:
    """Make a recogniser with random weights: `model(x)`, (B, in_channels, image_size, image_size) -> (B, num_classes).

    Args:
        name: Name in `MODELS`.
        attention: `own`, a name in `vca.ATTENTIONS`, or `{"name": ..., option: value}`. It stands in the blocks of
            `MODELS`, with their contrast grids unless it names one; the other blocks keep their own.
        num_classes: Length of the output.
        image_size: Side of the images in pixels.
        in_channels: Channels of the images.
        drop_path_rate: Probability, in training, that the last block is left out for an image; less in those before.
        changes: For small images or networks, `patch_size`, `hidden_size`, `depth` and `num_heads` of a DeiT.

    Returns:
        The network; its attribute `attention` is the spec with all options but the contrast grids of `MODELS`.

    Raises:
        ValueError: An unknown name or option, or sizes that do not fit; says what would.
    """
    recogniser = lookup(MODELS, name, "model").changed(name, **changes)
    spec = dict(attention) if isinstance(attention, Mapping) else {"name": attention}
    own = lookup(ATTENTION_CHOICES, spec.get("name"), "attention") is keep_own
    for option, value in {"num_classes": num_classes, "image_size": image_size, "in_channels": in_channels}.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{option} is {value!r}; choose a whole number of at least 1.")
    if not isinstance(drop_path_rate, int | float) or not 0 <= drop_path_rate < 1:
        raise ValueError(f"drop_path_rate is {drop_path_rate!r}; choose a number from 0 to less than 1.")
    if not recogniser.fits(image_size, own):
        what = "patches" if image_size % recogniser.stride else "windows or stripes"
        sizes = " or ".join(map(str, recogniser.sizes_near(image_size, own)))
        raise ValueError(
            f"image_size is {image_size}, which the {what} of {name} with attention {spec['name']} do not divide; "
            f"choose {sizes}."
        )
    if own:
        create_entry(ATTENTION_CHOICES, spec, "attention")  # it takes no options
    sizes = {"image_size": image_size, "num_classes": num_classes, "in_channels": in_channels}
    network = recogniser.network(**sizes, drop_path_rate=drop_path_rate, **({} if own else recogniser.swapped))
    network.attention = spec
    if not own:
        found = {"contrast_grid", "qkv_bias"} - {*spec}  # which differ from block to block
        network.attention = {k: v for k, v in resolved_attention(spec).items() if k not in found}
        put_attention(network, _specs(network, recogniser, spec))
    for module in list(network.modules()):
        for child, path in module.named_children():
            if isinstance(path, timm.layers.DropPath):  # which draws from the global generator
                setattr(module, child, DropPath(path.drop_prob))
    return network


def _specs(network: nn.Module, recogniser: RecogniserKind, spec: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Give each block that gets another attention its spec, with a contrast grid at most as large as its map."""
    sides = [side for side, depth in zip(recogniser.contrast, recogniser.depths, strict=True) for _ in range(depth)]
    has_grid = "contrast_grid" in options_of(ATTENTIONS[spec["name"]])
    specs = {}
    for index, (side, place) in enumerate(zip(sides, find_blocks(network), strict=True)):
        if side is not None:
            grid = {"contrast_grid": [min(side, length) for length in place.grid_size]} if has_grid else {}
            specs[index] = {**grid, **spec}
    return specs
