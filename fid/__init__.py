"""Frechet distances between sets of images: Gaussians fitted to the features of a network, and how far apart they lie.

With the Inception network of 2015 the distance is the FID, here by the protocol of pytorch-fid; with any other it is
named after what it is. Imports nothing of the other packages and is usable alone, also as `python -m fid`. Presets of
other protocols, sFID, Inception Score, precision and recall are not here yet.
"""

from fid.evaluate import Result, evaluate, statistics
from fid.features import EXTRACTORS, Classifier, FeatureExtractor, Inception
from fid.frechet import frechet_distance
from fid.images import Images
from fid.moments import Moments, Statistics, load_statistics

__all__ = [
    "EXTRACTORS",
    "Classifier",
    "FeatureExtractor",
    "Images",
    "Inception",
    "Moments",
    "Result",
    "Statistics",
    "evaluate",
    "frechet_distance",
    "load_statistics",
    "statistics",
]
