"""What any run needs: configs, images, weights, sampling, training. `from vca_engine import Pipeline` draws images."""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    if name == "Pipeline":  # loaded when it is asked for: whoever needs the images only shall not wait for diffusers
        return import_module("vca_engine.sampling.pipeline").Pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
