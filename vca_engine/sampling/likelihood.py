"""The likelihood of real images under a flow, in bits per dimension."""

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn
from tqdm import tqdm

from vca_engine import assemble
from vca_engine.config.options import SampleOptions, with_options
from vca_engine.config.reading import Spec
from vca_engine.config.schema import NEED_GUIDANCE, Config, SampleConfig
from vca_engine.images.codecs import PixelCodec, sample_posterior
from vca_engine.images.datasets import ImageDataset
from vca_engine.records import read_json, write_json
from vca_engine.sampling.drawing import Drawing
from vca_engine.sampling.image_sampler import ImageSampler
from vca_engine.sampling.sample_record import alone_at, require_same_settings
from vca_engine.seeds import mix, uniform


def likelihood_settings(config: Config, options: SampleOptions) -> SampleConfig:
    """Give the settings without guidance, and by the ODE with its own defaults: those of drawing may be too coarse.

    Raises:
        ValueError: A model or an option without likelihood.
    """
    if config.process["name"] != "flow":
        raise ValueError("--likelihood integrates the ODE of a flow, and this model is a diffusion.")
    if options.cfg_scale not in (None, 1.0):
        raise ValueError(f"cfg_scale is {options.cfg_scale}; a guided flow has no likelihood, so leave it out.")
    spec = {"name": "ode", **(options.sampler or {})}
    if spec["name"] != "ode":
        raise ValueError(f"sampler.name is {spec['name']!r}; a likelihood needs ode.")
    unguided = {"cfg_scale": 1.0, **dict.fromkeys(NEED_GUIDANCE)}
    return dataclasses.replace(with_options(config.sample, options), sampler=spec, **unguided)


def unit_of_bits(codec: nn.Module) -> str:
    """Name what the bits are of: 8-bit pixels; with an autoencoder latents, which compare with no pixels."""
    return "8-bit pixels" if isinstance(codec, PixelCodec) else "latents"


def measure_likelihood(drawing: Drawing, out: str | None, num: int | None, data: Spec) -> None:
    """Measure bits per dimension of real images under the flow, print and store them. All processes call this.

    Args:
        drawing: With the settings of `likelihood_settings`.
        out: A .json file; not given means likelihood.json in the folder of the model.
        num: ImageDataset, evenly chosen; not given means 1000, if there are as many.
        data: What to change of the images of training, or others by name.

    Raises:
        ValueError: ImageDataset that are not as the model's, or `out` holds another measurement, or cannot be one.
    """
    file = Path(out or drawing.pipe.folder / "likelihood.json")
    if file.suffix.lower() != ".json":
        raise ValueError(f"--out is {out!r}; a likelihood is a .json file.")
    with alone_at(file, file, is_main=drawing.state.is_main_process):
        _measure_into(file, drawing, num, data)


def _measure_into(file: Path, drawing: Drawing, num: int | None, data: Spec) -> None:
    """Measure, see `measure_likelihood`, or say what was measured before."""
    state, pipe = drawing.state, drawing.pipe
    spec = data if "name" in data else {**pipe.config.data, **data}
    config = dataclasses.replace(pipe.config, data=spec)
    images = assemble.images(assemble.with_image_size(config, pipe.info.image_size))
    if (images.image_size, images.class_names) != (pipe.info.image_size, pipe.class_names):
        raise ValueError(
            f"the images have {images.image_size} pixels and {images.num_classes} classes, the model "
            f"{pipe.info.image_size} and {len(pipe.class_names)}, or the classes have other names."
        )
    if num and num > len(images) and state.is_main_process:
        print(f"there are {len(images)} images, not {num}", file=sys.stderr)
    num = min(num or 1000, len(images))
    unit = unit_of_bits(pipe.codec)
    settings = {key: value for key, value in drawing.settings().items() if key != "quantize"}  # no pixel is made
    asked = {"of": unit, "num": num, "data": spec, **settings}
    if state.is_main_process and file.exists():
        require_same_settings(file, asked, file)
        known = read_json(file).get("bits_per_dim")
        if not isinstance(known, float):
            raise ValueError(f"{str(file)!r} is damaged: it has no number bits_per_dim; choose another --out.")
        print(f"{file}: {known:.3f} bits per dimension, measured before")
    state.wait_for_everyone()
    if file.exists():
        return
    indices = np.linspace(0, len(images) - 1, num).round().astype(int).tolist()
    values = bits_per_dim_of(images, indices, drawing)  # (num,)
    nfe = drawing.nfe_of_all()
    if state.is_main_process:
        error = values.std(ddof=1) / num**0.5 if num > 1 else None
        record = {"bits_per_dim": values.mean(), "standard_error": error, **asked, **drawing.facts(nfe)}
        each = {"images": indices, "bits_per_dim_of_each": values.tolist()}
        write_json(file, {**record, **each})
        found = f"{values.mean():.3f}" + ("" if error is None else f" ± {error:.3f}")
        print(f"{found} bits per dimension of {unit} ({num} images, {nfe:g} network evaluations each)")
        print(f"wrote {file}")


def bits_per_dim_of(images: ImageDataset, indices: Sequence[int], drawing: Drawing) -> np.ndarray:
    """Measure images of a dataset, (N,) float64 in the order of `indices`. All processes call this, and share them."""
    state, size = drawing.state, drawing.sampling.group_size
    batches = [indices[k : k + size] for k in range(0, len(indices), size)][state.process_index :: state.num_processes]
    found = {}
    for batch in tqdm(batches, desc="likelihood", unit="batch", disable=not state.is_main_process):
        found |= dict(zip(batch, bits_of(images, batch, drawing.image_sampler, drawing.pipe.codec), strict=True))
    found = {i: bits for part in gather_object([found]) for i, bits in part.items()}
    return np.array([found[i] for i in indices])


@torch.no_grad()
def bits_of(images: ImageDataset, indices: Sequence[int], image_sampler: ImageSampler, codec: nn.Module) -> list[float]:
    """Measure one batch of images of a dataset, each a function of the seed, its number and its class.

    Pixels x = k / 127.5 - 1 get uniform noise of their own width 1 / 127.5, and log2(127.5) bits for the change of
    scale, so that the result bounds the bits of the discrete pixels from above. Latents are drawn from the
    autoencoder's posterior.

    Args:
        images: The dataset.
        indices: Which of them; one batch.
        image_sampler: By the ODE, without guidance.
        codec: ImageDataset to latents.

    Raises:
        NonFiniteError: Some of them have none; says what to try.

    Source: Theis et al. 2016, arXiv:1511.01844, section 3.1 (uniform noise).
    """
    pairs, seed = [images[i, False] for i in indices], image_sampler.seed
    x = torch.stack([image for image, _ in pairs]).to(image_sampler.device)  # (B, C, H, W) in [-1, 1]
    positions = torch.tensor(list(indices), device=image_sampler.device)
    moments, extra = codec.moments(x), 0.0
    if isinstance(codec, PixelCodec):
        u = uniform(mix(seed, 1), positions, x[0].numel()).view(x.shape)  # in (0, 1)
        moments, extra = x + ((u - 0.5) / 127.5).to(x.dtype), math.log2(127.5)
    latents = sample_posterior(moments, codec.channels, seed, positions)  # (B, C, h, w)
    generators = [torch.Generator().manual_seed(mix(seed, i)) for i in indices]
    with image_sampler.advising():
        predict = image_sampler.predict([label for _, label in pairs])
        bits = image_sampler.sample.bits_per_dim(predict, latents, generators)  # (B,)
        if not (finite := bits.isfinite()).all():
            raise FloatingPointError(f"{int((~finite).sum())} of {len(bits)} images have no finite likelihood")
    image_sampler.drawn += len(indices)
    return (bits + extra).tolist()
