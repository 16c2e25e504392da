"""The former address of `python export.py`, which goes on working in a clone: `python -m dit_vca.interop export`."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    program = Path(__file__).parents[1] / "export.py"
    if not program.is_file():
        sys.exit("python -m dit_vca.interop export is now export.py, which is in a clone of the repository only.")
    print("python -m dit_vca.interop export is now: python export.py", file=sys.stderr)
    sys.argv = ["export.py", *sys.argv[2 if sys.argv[1:2] == ["export"] else 1 :]]
    runpy.run_path(str(program), run_name="__main__")
