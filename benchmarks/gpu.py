"""All that wants a GPU, where there is torch with triton and nothing else: are the kernels right, and how fast are they?

    python benchmarks/gpu.py --json gpu.json

Compares ``steer_inplace`` on the GPU with float64 for 1 to 256 rows of 152,064 logits, then times it against copies of the same
bytes. Nothing has to be installed from this repository. The exit code is 1 if a comparison fails, also then the file is written.
To see on a machine without a GPU that the way is clear:

    TRITON_INTERPRET=1 python benchmarks/gpu.py --device cpu --backend triton --rows 1 3 --vocab 3000 --repetitions 2
"""

import json
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from costeer_vllm.bench import kernel

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def main() -> None:
    parser = kernel.parser(__doc__)
    parser.set_defaults(device="cuda", rows=ROWS)
    options = parser.parse_args()
    settings = kernel.settings_of(options)
    if settings.on_gpu and not torch.cuda.is_available():
        sys.exit("no CUDA device is visible: run this where there is one, or see --help for a run without")
    torch.manual_seed(0)
    checks = kernel.show_checks(settings)
    timings = kernel.show(settings)
    failed = sum(not check.good for check in checks)
    print(f"{len(checks) - failed} of {len(checks)} comparisons are good")
    if options.json:
        found = {"checks": [asdict(check) for check in checks], "timings": [kernel.as_json(timing) for timing in timings]}
        options.json.write_text(json.dumps(facts(settings) | found, indent=2) + "\n")
    sys.exit(int(failed > 0))


def facts(settings: kernel.Settings) -> dict[str, Any]:
    """What the figures depend on."""
    import triton

    about = {"device": kernel.device_name(settings), "torch": torch.__version__, "triton": triton.__version__}
    about |= {"cuda": torch.version.cuda, "python": platform.python_version()}
    if settings.on_gpu:
        properties = torch.cuda.get_device_properties(0)
        about["compute_capability"] = f"{properties.major}.{properties.minor}"
    return about | asdict(settings)


if __name__ == "__main__":
    main()
