"""A trained recogniser, ready: one way to load it, from images to the probabilities of classes, and to ONNX."""

import io
import json
import logging
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from classify.process import Views
from classify.published import read_published_recogniser
from vca_engine import assemble
from vca_engine.files import content_of, written_aside
from vca_engine.images.files import naming
from vca_engine.images.pixels import check_beginning, read_image, to_rgb
from vca_engine.sampling.trained_model import TrainedModel, load_model

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class Recogniser(TrainedModel):
    """A trained network that names the class of images, and the views of them that it looks at.

        recogniser = Recogniser.from_pretrained("runs/deit_tiny_vca")
        probabilities = recogniser(["cat.jpg", "dog.jpg"])  # (2, K), in the order of recogniser.class_names

    Attributes:
        crop: Share of the shorter side of an image that is shown: 0.875 is 224 of 256 pixels.
        precision: no (float32) or bf16.
    """

    crop: float
    precision: str

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        weights: str = "ema",
        crop: float | None = None,
        device: str | torch.device | None = None,
        precision: Literal["no", "bf16"] = "no",
        tf32: bool = True,
        compile: bool = False,
    ) -> Self:
        """Load a recogniser.

        Args:
            path: A run's folder (its newest checkpoint), one of its checkpoints, or a folder that `save_pretrained`
                wrote; a file of published weights of a network with its own attention, under timm's or the published
                keys; or a name on the hub of one of these.
            weights: Of a run: ema, ema-0.05 and the like, or model.
            crop: See `Recogniser`; not given means as in training.
            device: Not given means the GPU if there is one.
            precision: no (float32) or bf16.
            tf32: Whether a GPU may round the inputs of float32 products to TF32.
            compile: Compile each block with torch.compile.

        Raises:
            FileNotFoundError: There is no such path or name.
            ValueError: It holds something else.
        """
        model = load_model(path, weights, read=read_published_recogniser)
        if assemble.is_generator(model.config):
            raise ValueError(f"{str(path)!r} holds no recogniser; sample.py draws with it.")
        model.prepare(device, tf32=tf32, compile=compile)
        found = cls(**vars(model))
        found.crop, found.precision = crop or model.config.eval.crop, precision
        return found

    def usage(self, name: str) -> str:
        """Write lines of Python that use the model out of the folder, or from the hub, by its name."""
        return (
            "from classify import Recogniser  # in a clone of the repository, or anywhere after pip install . in it\n\n"
            f'recogniser = Recogniser.from_pretrained("{name}")\n'
            'probabilities = recogniser(["image.jpg"])  # (1, K), in the order of recogniser.class_names'
        )

    def views(self, images: Any) -> Views:
        """Give a dataset of what the network sees of a dataset of images, (C, image_size, image_size) each."""
        return self.process.evaluation_views(images, self.crop)

    def view(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Give what the network sees of images, (B, C, image_size, image_size)."""
        transform, mode = self.views(self.info).transform, "L" if self.info.channels == 1 else "RGB"
        return torch.stack([transform(to_rgb(picture).convert(mode)) for picture in pictures])

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Compute logits (B, K) float32 of views (B, C, image_size, image_size)."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.network(x.to(self.device, non_blocking=True)).float()

    def __call__(self, images: Sequence[str | Path | Image.Image]) -> Tensor:
        """Compute the probabilities of the classes, (B, K), for images or files of them.

        Raises:
            OSError: The disk does not give a file, or it is not there.
            ValueError: A file is no image; names it.
        """
        pictures = [image if isinstance(image, Image.Image) else read_picture(image) for image in images]
        return self.logits(self.view(pictures)).softmax(dim=1).cpu()

    def describe_views(self) -> dict[str, Any]:
        """Say how an image becomes what the network sees: JSON values."""
        normalise = self.views(self.info).transform.transforms[-1]
        mean, std = (getattr(normalise, name).tolist() for name in ("mean", "std"))
        size = {"image_size": self.info.image_size, "channels": self.info.channels}
        return {**size, "crop": self.crop, "interpolation": "bicubic", "mean": mean, "std": std}

    def export_onnx(self, file: str | Path) -> float:
        """Write an ONNX file: `image`, (batch, C, image_size, image_size) -> `logits`, (batch, K); any batch.

        Its metadata say how an image becomes its input, the names of the classes, and which weights they are. What
        onnxruntime computes with it is compared with this network.

        Returns:
            The largest difference of a logit.

        Raises:
            ValueError: A package is missing; says how to get it.
            OSError: It cannot be written.
        """
        if missing := [name for name in ONNX_PACKAGES if find_spec(name) is None]:
            raise ValueError(f"the export needs the package {missing[0]}; run: pip install {' '.join(ONNX_PACKAGES)}.")
        import onnxruntime

        info, network = self.info, self.network.float()
        x = torch.randn(3, info.channels, info.image_size, info.image_size, generator=torch.Generator().manual_seed(0))
        batch = ({0: torch.export.Dim("batch", min=1)},)
        names = {"input_names": ["image"], "output_names": ["logits"]}
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # of packages that it does not need
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                network, (x[:2].to(self.device),), dynamo=True, dynamic_shapes=batch, verbose=False, **names
            )
        facts = {**self.describe_views(), "class_names": self.class_names, "sha256": self.sha256, **self.source}
        program.model.metadata_props.update({key: json.dumps(value) for key, value in facts.items()})
        with written_aside(file) as temporary:
            program.save(temporary, external_data=False)
            session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])
            found = session.run(None, {"image": x.numpy()})[0]  # (3, K)
        return float(np.abs(found - self.logits(x).cpu().numpy()).max())


def read_picture(path: str | Path) -> Image.Image:
    """Read an image file as RGB, in its own size.

    Raises:
        OSError: The disk does not give it, or it is not there.
        UnreadableImageError: It is no image, or a damaged or an animated one; names it.
    """
    content = content_of(path)
    with naming(str(path)):
        check_beginning(content[:16])
        return read_image(io.BytesIO(content))
