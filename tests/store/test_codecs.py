"""Codecs: what comes back is close to what went in, in exactly the shape and bytes promised."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a3_engine import A3Engine
from a3_engine.chunks.codecs import CODECS, check_codec
from a3_engine.chunks.payload import Header, Payload, join, open_bytes
from a3_engine.kv import ChunkKV
from tests.tiny import tiny_model, tiny_tokenizer

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DOCUMENT = "The lamp of the lighthouse burns through the night, and the keeper sleeps at noon."


def random_kv(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> ChunkKV:
    """Channels of very different size and offset, as real keys have."""
    generator = torch.Generator().manual_seed(seed)
    channels = torch.randn(shape[-1], generator=generator).exp() * 3
    keys, values = (torch.randn(shape, generator=generator) * channels + 1 for _ in range(2))
    return ChunkKV(keys.to(dtype), values.to(dtype))


def header_of(kv: ChunkKV, codec: str) -> Header:
    return Header("a" * 64, "engine", tuple(kv.keys.shape), str(kv.keys.dtype), codec)


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, high) for high in (3, 3, 70, 70))),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_decoding_stays_within_the_tolerance(name, shape, dtype, seed):
    """Of each channel's (keys) or token's (values) largest magnitude, plus the dtype's rounding."""
    codec, kv = CODECS[name], random_kv(shape, dtype, seed)
    header = header_of(kv, name)
    payload = Payload.of(kv, header)
    found = {n: (tuple(t.shape), t.dtype) for n, t in payload.tensors.items()}
    assert found == {n: spec[:2] for n, spec in header.layout.items()}
    assert (payload.nbytes,) * 2 == header.nbytes
    again = payload.kv()
    assert (again.keys.shape, again.keys.dtype) == (kv.keys.shape, dtype)
    rounding = torch.finfo(dtype).eps if name != "raw" else 0
    for before, after, axis in ((kv.keys, again.keys, 2), (kv.values, again.values, 3)):
        largest = before.float().abs().amax(axis, keepdim=True)
        error = (before.float() - after.float()).abs()
        assert (error <= largest * (codec.tolerance + 2 * rounding)).all()


@pytest.mark.parametrize("name", CODECS)
def test_zeros_and_constants_survive(name):
    for value in (0.0, 2.0, -3.0):
        kv = ChunkKV(*(torch.full((2, 1, 33, 40), value) for _ in range(2)))
        again = Payload.of(kv, header_of(kv, name)).kv()
        assert torch.equal(again.keys, kv.keys)
        assert torch.equal(again.values, kv.values)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("nbytes", [1, 5_000, 10**9])
def test_layer_groups_join_to_the_same_chunk(name, nbytes):
    kv = random_kv((5, 2, 37, 24), torch.bfloat16)
    payload = Payload.of(kv, header_of(kv, name))
    parts = [part.to_bytes() for part in payload.split(nbytes)]
    assert len(parts) == {1: 5, 10**9: 1}.get(nbytes, len(parts))
    again = join(payload.header, parts, None)
    assert again.header == payload.header
    assert all(torch.equal(again.tensors[n], t) for n, t in payload.tensors.items())
    assert all(
        torch.equal(open_bytes(payload.to_bytes(), payload.header, None).tensors[n], t)
        for n, t in payload.tensors.items()
    )


def test_int8_halves_bf16_and_int4_takes_less_than_a_third():
    kv = random_kv((4, 3, 512, 64), torch.bfloat16)
    sizes = {name: Payload.of(kv, header_of(kv, name)).nbytes / kv.nbytes for name in CODECS}
    assert sizes["raw"] == 1.0
    assert sizes["int8"] < 0.53
    assert sizes["int4"] < 0.33


def test_an_unknown_codec_is_refused_by_name():
    with pytest.raises(ValueError, match="int8"):
        check_codec("zip")
    with pytest.raises(ValueError, match="zip"):
        A3Engine.from_pretrained("some/model", codec="zip")


@pytest.mark.parametrize("name", CODECS)
def test_engines_answer_alike_on_a_miss_and_on_a_hit(tiny_engine, name):
    """A lossy codec shows from the first answer on, not only when the store is read."""
    engine = tiny_engine(codec=name)
    first, again = (
        engine.generate("Who sleeps?", chunks=[DOCUMENT], max_new_tokens=4) for _ in range(2)
    )
    assert (first.report.misses, again.report.hits) == (1, 1)
    assert first.report.bytes_written == again.report.bytes_read > 0
    assert first.text == again.text


def test_codecs_have_keys_of_their_own_and_the_prefix_is_exact(tmp_path):
    engines = {
        name: A3Engine.from_pretrained(
            tiny_model("llama"), tiny_tokenizer(), codec=name, cache_dir=tmp_path
        )
        for name in CODECS
    }
    assert len({engine.fingerprint for engine in engines.values()}) == len(CODECS)
    for engine in engines.values():
        done = engine.precompute([DOCUMENT], progress=False)
        assert dataclasses.astuple(done) == (1, 0, 0)
    stored = engines["int4"].runtime.store.entries()
    from a3_engine.chunks.payload import read_header

    headers = [read_header(path) for _, path in stored]
    assert sorted(h.codec for h in headers) == ["int4", "int8", *["raw"] * 4]
    for engine in engines.values():
        engine.close()
