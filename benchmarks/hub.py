"""The hub alone, from a checkout: ``python benchmarks/hub.py``; see ``costeer_vllm/bench/hub.py``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from costeer_vllm.bench.hub import main

if __name__ == "__main__":
    main()
