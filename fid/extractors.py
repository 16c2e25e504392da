"""The networks by name, as the command line and the configs know them."""

from pathlib import Path

from fid.dinov2 import DINOv2
from fid.features import Classifier, FeatureExtractor
from fid.inception import Inception
from vca_engine.files import sha256_of

EXTRACTORS = {
    "inception": Inception,
    "dinov2": DINOv2,
    "classifier": Classifier.load,
}  # each takes a weights file or None

LABELS = {"inception": "FID", "dinov2": DINOv2.label, "classifier": Classifier.label}  # what their distances are called


def build_extractor(name: str, weights: str | Path | None, preset: str = "adm", tf32: bool = False) -> FeatureExtractor:
    """The network `name` of `EXTRACTORS`; `preset` and `tf32` are Inception's.

    Raises:
        FileNotFoundError: No weights.
        ValueError: Weights of something else, or a preset of another network.
    """
    if name == "inception":
        return Inception(weights, preset, tf32=tf32)
    if preset != "adm":
        raise ValueError(f"the preset {preset!r} is Inception's; the extractor is {name!r}.")
    extractor = EXTRACTORS[name](weights)
    if weights is not None:
        extractor.weights = {"path": str(weights), "sha256": sha256_of(weights)}
    return extractor
