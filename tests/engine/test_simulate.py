"""What is simulated follows from the counts and the parameters, and says that it is simulated."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest
import torch

from a3_engine.benchmark.roofline import Shape, work
from a3_engine.chunks.codecs import CODECS
from a3_engine.kv import ChunkKV
from benchmarks.simulate import (
    BF16,
    FRESH_TOKENS,
    MACHINES,
    MODELS,
    Efficiency,
    fits,
    main,
    needed_bandwidths,
    simulate,
    stored_bytes,
    tables,
)

LLAMA, A100 = MODELS["Llama-3.1-8B"], MACHINES[0]
IDEAL = Efficiency(1.0, 1.0, 1.0, 1.0, 1.0, layer_s=0.0, repair_passes=0.0)
HERE = {"context": 4096, "ratio": 0.15}


def test_an_ideal_machine_takes_its_limit():
    needed = work(LLAMA, [torch.arange(4096 + FRESH_TOKENS)] * LLAMA.layers, BF16)
    limit = needed.seconds(A100.tflops * 1e12, A100.memory_gb_s * 1e9)
    assert simulate(LLAMA, A100, **HERE, efficiency=IDEAL).prefill == pytest.approx(limit)
    everything = simulate(LLAMA, A100, context=4096, ratio=1.0, efficiency=IDEAL)
    assert everything.compute == pytest.approx(limit)
    assert simulate(LLAMA, A100, **HERE).prefill > limit


def test_less_is_computed_at_a_lower_ratio_and_nothing_is_selected_at_none():
    times = [simulate(LLAMA, A100, context=4096, ratio=ratio) for ratio in (0.0, 0.05, 0.3)]
    assert [each.compute for each in times] == sorted(each.compute for each in times)
    assert (times[0].select == 0.0) != (times[1].select == 0.0)


def test_windows_make_a_long_prompt_cheaper():
    windows = tuple(512 * (layer % 2) for layer in range(LLAMA.layers))
    sliding = replace(LLAMA, windows=windows)
    ours, theirs = (simulate(shape, A100, context=32_768, ratio=0.15) for shape in (sliding, LLAMA))
    assert ours.select < theirs.select
    assert ours.compute < theirs.compute


@pytest.mark.parametrize("codec", ["raw", "int8", "int4"])
def test_the_needed_bandwidths_do_what_they_say(codec):
    how, nbytes = Efficiency(), stored_bytes(LLAMA, 4096, codec)
    needed = needed_bandwidths(nbytes, simulate(LLAMA, A100, **HERE, codec=codec), how)
    even = simulate(LLAMA, A100, **HERE, codec=codec, tier_gb_s=needed.even)
    assert even.speedup == pytest.approx(1.0)
    half = simulate(LLAMA, A100, **HERE, codec=codec, tier_gb_s=needed.half)
    assert half.read == pytest.approx(half.fusion / 2)
    slower = simulate(LLAMA, A100, **HERE, codec=codec, tier_gb_s=0.9 * needed.even)
    assert slower.speedup < 1.0


def test_where_decoding_takes_longer_than_prefill_no_tier_helps():
    how = Efficiency(decode_gb_s={"int4": 1e-3})
    times = simulate(LLAMA, A100, **HERE, codec="int4", efficiency=how)
    assert times.slowest == "decode"
    assert needed_bandwidths(1.0, times, how).even == inf


@pytest.mark.parametrize("codec", CODECS)
def test_stored_bytes_are_the_codecs_own(codec):
    shape = Shape(2, 64, 4, 2, 32, 128, 100)
    states = torch.randn(2, 2, 512, 32).bfloat16()
    tensors = CODECS[codec].encode(ChunkKV(states, states))
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    assert stored_bytes(shape, 1024, codec) == 2 * nbytes


def test_the_published_shapes_have_the_published_sizes():
    """Llama-3.1-8B has 8.03 and Qwen3-32B 32.8 thousand million parameters, both tables counted."""
    sizes = [(each.weights + each.hidden * each.vocabulary) / 1e9 for each in MODELS.values()]
    assert sizes == pytest.approx([8.03, 32.8], rel=0.01)
    by_name = {machine.name: machine for machine in MACHINES}
    assert not fits(MODELS["Qwen3-32B"], by_name["RTX 4090"], 4096)
    assert fits(MODELS["Qwen3-32B"], by_name["H100 SXM"], 4096)


def test_the_command_prints_tables_that_say_that_they_are_simulated(capsys):
    main(["--contexts", "4096", "--ratio", "0.15"])
    printed = capsys.readouterr().out
    assert printed.strip() == tables([4096], 0.15)
    parts = [part.split("\n") for part in printed.strip().split("\n\n")]
    drawn = [number for number, part in enumerate(parts) if part[0].startswith("|")]
    assert len(drawn) == 3
    for number in drawn:
        assert parts[number - 1][0].startswith("Simulated")
        assert len({line.count("|") for line in parts[number]}) == 1
        assert len(parts[number]) == 2 + len(MODELS) * len(MACHINES) - 1  # one does not fit
