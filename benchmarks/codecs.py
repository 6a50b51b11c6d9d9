"""What each codec costs: bytes of a chunk against how far answers are from a full prefill.

Usage: python benchmarks/codecs.py --data FILE [--data FILE] [--half second] [--limit 12]
           [--model M] [--codecs int8,int4,compact,compact-small] [--methods full_reuse,mend]

Every example has one full prefill, and its chunks are computed once; each codec encodes and decodes
them before they are used. Figures are means over the examples: the answer's divergence from the
full prefill in nats, beyond that of raw chunks.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict

from a3_engine import A3Engine
from a3_engine.chunks.calibration import make_codec
from a3_engine.chunks.codecs import CODECS
from a3_engine.chunks.codecs.base import Codec
from a3_engine.chunks.payload import Payload
from a3_engine.evaluation.datasets import read_examples
from a3_engine.evaluation.fidelity import fidelity, full_prefill
from a3_engine.kv import ChunkKV
from a3_engine.method import make_methods
from a3_engine.model.gguf import DEMO_MODEL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", action="append", required=True)
    parser.add_argument("--half", choices=("first", "second"), default="second")
    parser.add_argument("--limit", type=int, default=12)
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cache-dir")
    parser.add_argument("--codecs", default="int8,int4,compact,compact-small")
    parser.add_argument("--methods", default="full_reuse,mend")
    options = parser.parse_args()
    engine = A3Engine.from_pretrained(
        options.model, dtype=options.dtype, cache_dir=options.cache_dir
    )
    runtime, methods = engine.runtime, make_methods(options.methods.split(","), [None], None)
    library = runtime.library
    assert library is not None
    codecs: dict[str, Codec] = {"raw": CODECS["raw"]}
    for name in options.codecs.split(","):
        codecs[name], _ = make_codec(
            name,
            engine.fingerprint,
            library.store,
            library.encoder,
            runtime.planner.tokenize_text,
            runtime.planner.prefix_ids,
        )
    sizes: dict[str, list[float]] = defaultdict(list)
    for data in options.data:
        examples = read_examples(data)
        middle = len(examples) // 2
        half = examples[middle:] if options.half == "second" else examples[:middle]
        lost: dict[tuple[str, str], list[float]] = defaultdict(list)
        for example in half[: options.limit]:
            reference = full_prefill(engine, example)
            for segment in reference.prompt.segments:
                if segment.kind == "chunk":
                    for each in (segment, library.head(segment)):
                        if each is not None:
                            library.fetch(each)
            for name, codec in codecs.items():

                def through(payload: Payload, codec: Codec = codec, name: str = name) -> ChunkKV:
                    kv = payload.kv()
                    tensors = codec.encode(kv)
                    sizes[name].append(
                        sum(t.nbytes for t in tensors.values())
                        / (2 * (kv.keys.numel() + kv.values.numel()))
                    )
                    return codec.decode(tensors, *payload.header.shapes, kv.keys.dtype)

                library._decoded = through  # type: ignore[method-assign]
                for method in methods:
                    found = fidelity(engine, reference, method)
                    lost[name, method.selector.name].append(found.kl_answer)
            del library._decoded
            _show(data, lost, sizes)


def _show(
    data: str, lost: dict[tuple[str, str], list[float]], sizes: dict[str, list[float]]
) -> None:
    for (name, method), kl in lost.items():
        raw = lost["raw", method]
        beyond = [one - other for one, other in zip(kl, raw, strict=False)]
        spread = statistics.stdev(beyond) / len(beyond) ** 0.5 if len(beyond) > 1 else 0.0
        line = {
            "data": data.rpartition("/")[2],
            "codec": name,
            "method": method,
            "n": len(kl),
            "of_bf16": round(statistics.mean(sizes[name]), 4),
            "kl": round(statistics.mean(kl), 5),
            "beyond_raw": round(statistics.mean(beyond), 5),
            "standard_error": round(spread, 5),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
