"""An evaluator of generated images: FID, sFID, Inception Score, precision, recall and others, by a stated protocol.

The preset `adm` computes what the tables of ADM, DiT and SiT hold; every result carries the record of how it was made.
Of the other packages it imports `vca_engine.images` and the small files only. It is usable without the rest, also as
`python -m fid`.
"""

from fid.commands import compare, evaluate, open_evaluator, statistics
from fid.evaluator import Evaluator
from fid.frechet import frechet_distance
from fid.images import Images
from fid.metrics import METRICS
from fid.moments import Moments, Statistics
from fid.networks import EXTRACTORS, Classifier, DINOv2, FeatureExtractor, Inception, build_extractor
from fid.networks.inception import PRESETS
from fid.pictures import curve, neighbours
from fid.references import Reference, load_ref, open_reference, save_reference
from fid.result import Result
from vca_engine.images import quantize

CHOICES = {"extractor": EXTRACTORS, "preset": PRESETS, "metrics": METRICS}  # what a config chooses by words

__all__ = [
    "CHOICES",
    "EXTRACTORS",
    "METRICS",
    "PRESETS",
    "Classifier",
    "DINOv2",
    "Evaluator",
    "FeatureExtractor",
    "Images",
    "Inception",
    "Moments",
    "Reference",
    "Result",
    "Statistics",
    "build_extractor",
    "compare",
    "curve",
    "evaluate",
    "frechet_distance",
    "load_ref",
    "neighbours",
    "open_evaluator",
    "open_reference",
    "quantize",
    "save_reference",
    "statistics",
]
