"""The networks by name: one entry of `EXTRACTORS` each, which the command line and the programs choose from."""

from pathlib import Path

from fid.networks.classifier import Classifier
from fid.networks.dinov2 import DINOv2
from fid.networks.extractor import FeatureExtractor
from fid.networks.inception import Inception
from fid.networks.pixels import Pixels
from fid.networks.random_inception import RandomInception
from vca_engine.files import sha256_of

EXTRACTORS = {
    "inception": Inception,
    "dinov2": DINOv2,
    "classifier": Classifier,
    "random-inception": RandomInception,
    "pixels": Pixels,
}


def build_extractor(name: str, weights: str | Path | None, preset: str = "adm", tf32: bool = False) -> FeatureExtractor:
    """Make the network `name` of `EXTRACTORS` with the weights of a file; `preset` and `tf32` are Inception's.

    Raises:
        FileNotFoundError: No weights.
        ValueError: An unknown name, weights of something else or for what has none, or a preset of another network.
    """
    if name not in EXTRACTORS:
        raise ValueError(f"the extractor is {name!r}; choose one of {', '.join(EXTRACTORS)}.")
    if name == "inception":
        return Inception(weights, preset, tf32=tf32)
    if preset != "adm":
        raise ValueError(f"the preset {preset!r} is Inception's; the extractor is {name!r}.")
    if weights is not None and not EXTRACTORS[name].reads_weights:
        raise ValueError(f"the extractor {name} has no file of weights; leave --weights out.")
    extractor = EXTRACTORS[name].load(weights)
    if weights is not None:
        extractor.weights = {"path": str(weights), "sha256": sha256_of(weights)}
        known = {key: getattr(extractor, key, None) for key in ("accuracy", "made_of")}  # of a classifier
        extractor.weights |= {key: value for key, value in known.items() if value is not None}
    return extractor
