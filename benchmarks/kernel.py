"""``steer_inplace`` against a copy, from a checkout: ``python benchmarks/kernel.py``; see ``costeer_vllm/bench/kernel.py``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from costeer_vllm.bench.kernel import main

if __name__ == "__main__":
    main()
