"""What each codec costs: bytes of a chunk against how far answers are from a full prefill.

Usage: python benchmarks/codecs.py --data FILE [--data FILE] [--half second] [--limit 12]
           [--model M] [--codecs int8,int4,compact,compact-small] [--methods full_reuse,mend]

Every example has one full prefill, and its chunks are computed once; each codec encodes and decodes
them before they are used. Last come the processor times of encoding 512 tokens of them, and of a
first read: checksum, decoding, copy; medians of rounds in turn. Figures are means over the
examples: the answer's divergence from the full prefill in nats, beyond that of raw chunks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict

import torch

from a3_engine import A3Engine
from a3_engine.chunks.calibration import make_codec
from a3_engine.chunks.codecs import CODECS
from a3_engine.chunks.codecs.base import Codec
from a3_engine.chunks.payload import Header, Payload, open_bytes
from a3_engine.evaluation.datasets import read_examples
from a3_engine.evaluation.fidelity import fidelity, full_prefill
from a3_engine.kv import ChunkKV
from a3_engine.method import make_methods
from a3_engine.model.gguf import DEMO_MODEL

TOKENS = 512  # of the chunk that is timed


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
    seen: list[ChunkKV] = []
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
                            kv = library.fetch(each).kv
                            if sum(one.n_tokens for one in seen) < TOKENS:
                                seen.append(kv)
            # What chunks are computed after is always raw.
            exact = {
                library.header(each).key
                for each in reference.prompt.segments
                if each.kind == "prefix"
            }
            for name, codec in codecs.items():

                def through(
                    payload: Payload,
                    codec: Codec = codec,
                    name: str = name,
                    exact: set[str] = exact,
                ) -> ChunkKV:
                    kv = payload.kv()
                    if payload.header.key in exact:
                        return kv
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
    _speeds(
        codecs,
        ChunkKV(
            *(
                torch.cat(s, 2)[:, :, :TOKENS]
                for s in ([k.keys for k in seen], [k.values for k in seen])
            )
        ),
    )


def _speeds(codecs: dict[str, Codec], kv: ChunkKV, rounds: int = 7) -> None:
    encode: dict[str, list[float]] = defaultdict(list)
    read: dict[str, list[float]] = defaultdict(list)
    into = ChunkKV(torch.empty_like(kv.keys), torch.empty_like(kv.values))
    for _ in range(rounds):
        for name, codec in codecs.items():
            header = Header("a" * 64, "", tuple(kv.keys.shape), str(kv.keys.dtype), name)
            started = time.process_time()
            payload = Payload.of(kv, header, codec=codec)
            encode[name].append(time.process_time() - started)
            content = payload.to_bytes()
            started = time.process_time()
            again = open_bytes(content, header, None).kv(codec)
            into.keys.copy_(again.keys)
            into.values.copy_(again.values)
            read[name].append(time.process_time() - started)
    for name in codecs:
        line = {
            "codec": name,
            "tokens": kv.n_tokens,
            "encode_cpu_ms": round(1000 * statistics.median(encode[name]), 1),
            "first_read_cpu_ms": round(1000 * statistics.median(read[name]), 1),
        }
        print(json.dumps(line))


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
