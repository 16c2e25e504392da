r"""The digits score: accuracy and Frechet distance of samples in the features of a small classifier. It is no FID-50K.

    python -m demo.score --checkpoint runs/demo --samples runs/demo/samples.npz \
        --classifier runs/mnist/classifier.safetensors

Each row of the table is compared with the real test images. Real training images give the floor, since no generator can
be closer than the data itself; the same images through the codec show what the codec costs; noise is the ceiling.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import fid
from demo.classifier import pixels
from fid.training import accuracy
from vca import create
from vca_engine import assemble
from vca_engine.config.cli import parse, report_errors
from vca_engine.config.reading import FilePath, Strict, from_dict
from vca_engine.config.schema import Config
from vca_engine.files import write_text
from vca_engine.images import to_uint8
from vca_engine.images.codecs import sample_posterior
from vca_engine.weights import checkpoint


@dataclass(frozen=True)
class ScoreArguments(Strict):
    """The samples to score.

    Args:
        checkpoint: The run that drew the samples; says where its data comes from.
        samples: The npz that sample.py wrote.
        classifier: The file that demo.classifier wrote.
    """

    checkpoint: FilePath
    samples: FilePath
    classifier: FilePath


@report_errors("demo.score")
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv`, by default that of the process."""
    args = parse(ScoreArguments, argv, prog="python -m demo.score", description=__doc__)
    folder = checkpoint.find(args.checkpoint)
    config = from_dict(Config, checkpoint.read_record(folder)["config"], str(folder))
    classifier = fid.Classifier.load(args.classifier)
    try:
        with np.load(args.samples) as file:
            samples, labels = nchw(file["arr_0"]), torch.from_numpy(file["arr_1"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"samples {args.samples!r} is not an npz written by sample.py: {error}.") from None
    train, test = (create(assemble.DATASETS, {**config.data, "split": s}, "data") for s in ("train", "test"))

    num = min(len(samples), len(train))
    real, real_labels = pixels(train)[:num], torch.from_numpy(train.labels[:num])
    rows = {"samples": (samples, labels), "real, training (floor)": (real, real_labels)}
    if config.codec["name"] == "vae":
        codec = assemble.codec(config, train.channels)
        inputs = torch.stack([train[i, False][0] for i in range(num)])  # (num, channels, H, W) in [-1, 1]
        moments = torch.cat([codec.moments(x) for x in inputs.split(100)])
        latents = sample_posterior(moments, codec.channels, config.seed, torch.arange(num))
        decoded = [codec.decode(z) for z in latents.split(100)]
        rows["real, through the codec"] = (nchw(to_uint8(torch.cat(decoded))), real_labels)
    noise = torch.randint(256, real[:, :1].shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    rows["noise (ceiling)"] = (noise.expand(-1, 3, -1, -1), real_labels)

    reference = fid.statistics(pixels(test), classifier, device="cpu")
    table = {
        name: {
            "accuracy": accuracy(classifier, images, y),
            "frechet_distance": fid.evaluate(images, reference, classifier, groups=0, device="cpu").fd,
            "num_images": len(images),
        }
        for name, (images, y) in rows.items()
    }
    text = render(table, len(test), classifier)
    run_dir = Path(args.samples).parent
    write_text(run_dir / "score.json", json.dumps({"classifier": classifier.name, "rows": table}, indent=2))
    write_text(run_dir / "score.txt", text + "\n")
    print(text)


def render(table: dict[str, dict[str, float]], num_test: int, classifier: fid.Classifier) -> str:
    """Write the table as text."""
    right = f"{classifier.accuracy:.1%} right"
    lines = [
        f"Digits score (not FID-50K): features and labels of a small classifier ({right} on the",
        f"{num_test} real test images, to which every row is compared). Distances of other classifiers do not compare.",
        "",
        f"{'images':<26}{'number':>8}{'right class':>14}{'Frechet distance':>19}",
    ]
    for name, row in table.items():
        lines.append(f"{name:<26}{row['num_images']:>8}{row['accuracy']:>13.1%} {row['frechet_distance']:>18.2f}")
    return "\n".join(lines)


def nchw(images: np.ndarray) -> Tensor:
    """Turn (N, H, W, 3) uint8 into (N, 3, H, W) uint8."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


if __name__ == "__main__":
    main()
