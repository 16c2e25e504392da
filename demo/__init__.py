"""The whole pipeline in miniature, on real handwritten digits: `python -m demo`."""
