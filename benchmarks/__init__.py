"""Speed and memory beside the aims, each a program: `python -m benchmarks.attention --help`."""
