"""The former address of `python -m vca_engine.training.reconstruct`, which goes on working."""

import sys

from vca_engine.training.reconstruct import main

if __name__ == "__main__":
    print("python -m runtime.ema reconstruct is now: python -m vca_engine.training.reconstruct", file=sys.stderr)
    main(sys.argv[2:] if sys.argv[1:2] == ["reconstruct"] else None)
