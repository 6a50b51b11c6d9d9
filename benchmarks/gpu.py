"""What the engine does on one GPU: exactness, kernels, first tokens, decoding, memory.

`python -m benchmarks.gpu --out DIR [--deadline 380] [--steps NAME,NAME]` from the repository's
root, with torch for CUDA. Steps run in order of worth, each on its own, and results are written
after every line; what the deadline leaves no time for is named at the end. `--tiny` runs the same
code on tiny models, on a CPU too, to see that the script works. Weights are random: times are those
of the shapes, and answers mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
import traceback
from pathlib import Path

import torch
import transformers

from benchmarks.on_gpu import exactness, kernels, requests
from benchmarks.on_gpu.common import CUDA, Bench, timed

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def facts(bench: Bench) -> None:
    """Versions, and the rates of bus, memory and products that times are to be seen beside."""
    bench.say("versions", torch=torch.__version__, transformers=transformers.__version__,
              cpus=os.cpu_count())  # fmt: skip
    if not CUDA:
        return
    bench.say("card", card=torch.cuda.get_device_name(), cudnn=torch.backends.cudnn.version(),
              triton=__import__("triton").__version__)  # fmt: skip
    n = 2**28
    device, other = (torch.empty(n, dtype=torch.uint8, device="cuda") for _ in "ab")
    pinned = torch.ones(n, dtype=torch.uint8, pin_memory=True)
    pageable = torch.ones(n, dtype=torch.uint8)
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    few = torch.zeros(1, device="cuda")
    bench.say(
        "rates",
        pinned_GB_s=n / 1e6 / timed(lambda: device.copy_(pinned)),
        pageable_GB_s=n / 1e6 / timed(lambda: device.copy_(pageable)),
        to_host_GB_s=n / 1e6 / timed(lambda: pinned.copy_(device)),
        on_device_GB_s=2 * n / 1e6 / timed(lambda: other.copy_(device)),
        matmul_tflops=2 * 8192**3 / 1e9 / timed(lambda: left @ right),
        launch_us=timed(lambda: [few.add_(1) for _ in range(2000)]) / 2,
    )


# With the seconds that each takes, so that the deadline is kept.
STEPS = {
    facts: 5,
    kernels.attention: 10,
    kernels.one_token: 5,
    kernels.placing_and_repair: 10,
    exactness.exactness: 40,
    requests.start: 10,
    requests.waits: 10,
    requests.first_token: 30,
    requests.baseline: 30,
    requests.decoding: 20,
    requests.first_token_from_host: 30,
    requests.first_token_from_disk: 10,
    requests.ingestion: 15,
    requests.launches: 10,
    requests.exhausted: 5,
    exactness.together: 10,
    requests.qwen: 15,
    kernels.tiles: 25,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--deadline", type=float, default=380.0, help="seconds")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", help="names, by commas; all of them if not given")
    args = parser.parse_args()
    wanted = args.steps.split(",") if args.steps else [step.__name__ for step in STEPS]
    bench, left = Bench(args.out, args.tiny), []
    for step, seconds in STEPS.items():
        name = step.__name__
        if name not in wanted:
            continue
        begun = time.perf_counter()
        if begun - bench.started + seconds > args.deadline:
            left.append(name)
            continue
        try:
            step(bench)
        except Exception as error:  # one step's failure is a finding, and no end
            traceback.print_exc(limit=8)
            bench.say("failed", step=name, error=repr(error)[:300])
            gc.collect()
        bench.say("took", step=name, seconds=time.perf_counter() - begun, estimated=seconds)
    print("not run, for want of time:", ", ".join(left) or "nothing")


if __name__ == "__main__":
    main()
