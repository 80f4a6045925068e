"""`ray job submit --working-dir . -- python jobs/tune.py ...`: the same as `ray-dwm tune ...`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a job's working folder is the source tree

from ray_dwm.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "tune")
    main()
