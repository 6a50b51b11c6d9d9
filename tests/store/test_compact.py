"""The codec that is calibrated: small, within its error, the same in C++ and numpy, never wrong."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a3_engine import A3Engine, StoreOptions
from a3_engine.chunks import calibration
from a3_engine.chunks.calibration import fit
from a3_engine.chunks.codecs import coder
from a3_engine.chunks.codecs.compact import (
    BASIS,
    SHY,
    STRENGTHS,
    BasisFormat,
    Compact,
    CompactFormat,
    is_sound,
)
from a3_engine.chunks.payload import DamagedPayload, Header, Payload, open_bytes, read_header
from a3_engine.kv import ChunkKV
from a3_engine.native import build, coding
from tests.tiny import STAND_IN, tiny_model, tiny_tokenizer

DOCUMENT = "The lamp of the lighthouse burns through the night, and the keeper sleeps at noon."
QUESTION = "Who sleeps?"
SHAPES = [  # rows, heads, key and value dimension
    (4, 2, 16, 16),
    (3, 1, 12, 20),
    (1, 1, 1, 3),
    (5, 3, 7, 7),
]


def related_kv(shape: tuple[int, int, int, int], n_tokens: int, seed: int = 0) -> ChunkKV:
    """Layers that say something of each other, as a model's do."""
    rows, heads, key_dim, value_dim = shape
    generator = torch.Generator().manual_seed(seed)
    same = torch.Generator().manual_seed(99)
    width = heads * (key_dim + value_dim)
    hidden = torch.randn(n_tokens, width, generator=generator)
    states = []
    for _ in range(rows):
        turn = torch.randn(width, width, generator=same) / width**0.5
        hidden = hidden + 0.3 * torch.randn(n_tokens, width, generator=generator)
        states.append(hidden @ turn * torch.randn(width, generator=same).exp() + 1)
    keys, values = torch.stack(states).split([heads * key_dim, heads * value_dim], dim=2)
    return ChunkKV(
        keys.unflatten(2, (heads, key_dim)).transpose(1, 2).contiguous(),
        values.unflatten(2, (heads, value_dim)).transpose(1, 2).contiguous(),
    )


def calibrated(shape: tuple[int, int, int, int], name: str = "compact") -> Compact:
    return Compact(name, fit([related_kv(shape, 600, 7)], STRENGTHS[name]), "a digest")


def header_of(kv: ChunkKV, codec: str = "compact") -> Header:
    value_dim = kv.values.shape[3] if kv.values.shape[3] != kv.keys.shape[3] else 0
    return Header(
        "a" * 64, "engine", tuple(kv.keys.shape), str(kv.keys.dtype), codec, value_dim=value_dim
    )


@pytest.fixture(params=["loops", "numpy"])
def way(request, monkeypatch):
    """Both ways of coding."""
    if request.param == "numpy":
        monkeypatch.setattr(coding, "codes", lambda: False)
    elif build.library(build.CODER, None) is None:
        pytest.skip("this machine has no compiler")
    return request.param


@pytest.mark.parametrize("name", STRENGTHS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n_tokens", [1, 63, 130])
def test_a_round_trip_stays_within_the_error(name, shape, n_tokens):
    """Root mean square over a token's keys, or values, in a layer; also of texts never met."""
    codec = calibrated(shape, name)
    for factor in (1.0, 50.0, 0.0):  # as calibrated, and far from it
        kv = related_kv(shape, n_tokens, 3)
        kv = ChunkKV(kv.keys * factor, kv.values * factor)
        payload = Payload.of(kv, header_of(kv, name), codec=codec)
        opened = open_bytes(payload.to_bytes(), payload.header, None)
        again = opened.kv(codec)
        for kind in ("keys", "values"):
            before, after = getattr(kv, kind), getattr(again, kind)
            assert (before.shape, before.dtype) == (after.shape, after.dtype)
            scale = codec.basis[f"{kind[:-1]}_scale"]
            error = (before - after).square().mean((1, 3)).sqrt()
            size = before.square().mean((1, 3)).sqrt() + scale
            assert (error <= scale * codec.step * (0.5 + SHY) * 1.01 + 2**-8 * size).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_keeps_the_dtype_and_is_small(dtype):
    shape, n_tokens = (4, 2, 16, 16), 512
    kv = related_kv(shape, n_tokens, 3)
    kv = ChunkKV(kv.keys.to(dtype), kv.values.to(dtype))
    codec = calibrated(shape)
    payload = Payload.of(kv, header_of(kv), codec=codec)
    assert payload.kv(codec).keys.dtype == dtype
    assert payload.nbytes < kv.nbytes / 5
    expected = codec.nbytes(*payload.header.shapes, dtype)
    assert abs(payload.nbytes - expected) < 0.1 * expected
    least, most = payload.header.nbytes
    assert least < payload.nbytes < most


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 999),
    n_columns=st.integers(1, 40),
    n_tokens=st.integers(1, 200),
)
def test_the_coder_loses_nothing_and_both_ways_agree(seed, n_columns, n_tokens):
    random = np.random.default_rng(seed)
    counts = torch.from_numpy(_counts(random))
    columns = torch.from_numpy(random.integers(0, len(counts), n_columns).astype(np.uint8))
    tables = coder.Tables(counts, columns)
    reach = tables.most[:, None].expand(-1, n_tokens)
    numbers = (torch.randn(n_columns, n_tokens) * 5).int().clamp(-reach, reach)
    found = []
    for codes in (True, False):
        if codes and build.library(build.CODER, None) is None:
            continue
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(coding, "codes", lambda codes=codes: codes)
            coded = coder.encode(numbers, tables)
            assert torch.equal(coder.decode(coded, tables, n_tokens), numbers.float())
            found.append(coded)
    for one, other in zip(found[0], found[-1], strict=True):
        assert torch.equal(one, other)


def _counts(random: np.random.Generator) -> np.ndarray:
    """Frequencies of numbers around 0, some tables wide, some narrow."""
    counts = np.zeros((5, coder.SYMBOLS), np.int16)
    for row, reach in zip(counts, (1, 2, 9, 60, coder.REACH), strict=True):
        within = slice(coder.REACH - reach, coder.REACH + reach + 1)
        left = coder.TOTAL - (2 * reach + 1)
        share = random.dirichlet(np.ones(2 * reach + 1))
        row[within] = 1 + (share * left).astype(np.int16)
        row[coder.REACH] += coder.TOTAL - row.sum()
    return counts


def test_tables_and_words_of_a_stranger_do_no_harm(way):
    """Whoever can write a store can seal nonsense: it decodes to numbers, within the memory."""
    shape = (4, 2, 16, 16)
    kv, codec = related_kv(shape, 70, 3), calibrated(shape)
    payload = Payload.of(kv, header_of(kv), codec=codec)
    for change in (
        {"words": payload.tensors["words"][:0]},
        {"words": torch.randint(-(2**15), 2**15, (900,)).short()},
        {"states": torch.randint_like(payload.tensors["states"], -(2**31), 2**31 - 1)},
        {"ends": torch.tensor([2**62, -5, 2**40, 3])},
        {"outlier_at": torch.tensor([-1, 2**50, 5]), "outlier": torch.tensor([7]).int()},
        {"outlier_at": torch.tensor([4]), "outlier": torch.tensor([7, 8]).int()},
    ):
        bad = dataclasses.replace(payload, tensors={**payload.tensors, **change})
        again = open_bytes(bad.to_bytes(), bad.header, None).kv(codec)
        assert again.keys.shape == kv.keys.shape
        assert again.keys.isfinite().all()


@pytest.mark.parametrize("part", ["words", "states", "outlier"])
def test_a_damaged_chunk_is_refused(part):
    shape = (4, 2, 16, 16)
    kv, codec = related_kv(shape, 70, 3), calibrated(shape)
    payload = Payload.of(kv, header_of(kv), codec=codec)
    tensor = payload.tensors[part].float()
    wrong = dataclasses.replace(payload, tensors={**payload.tensors, part: tensor})
    with pytest.raises(DamagedPayload):
        open_bytes(wrong.to_bytes(), payload.header, None)
    content = payload.to_bytes()
    for damaged in (content[:-1], content + b"\0", content[:-9] + b"x" + content[-8:]):
        with pytest.raises(DamagedPayload):
            open_bytes(damaged, payload.header, None)


def test_unsound_tables_are_known():
    basis = fit([related_kv((4, 2, 16, 16), 100, 7)], 0.5)
    layout = BasisFormat().layout((4, 2, 1, 16), (4, 2, 1, 16), torch.float32)
    assert basis.keys() == layout.keys()
    assert all(spec.accepts(basis[name]) for name, spec in layout.items())
    assert is_sound(basis)
    for name, value in (
        ("counts", -1),
        ("counts", 0),
        ("key_table", 255),
        ("value_scale", 0),
        ("key_mean", float("nan")),
        ("value_beside", float("inf")),
    ):
        wrong = {**basis, name: torch.full_like(basis[name], value)}
        assert not is_sound(wrong), name


def test_payloads_are_whole_in_a_shared_store():
    shape = (4, 2, 16, 16)
    kv, codec = related_kv(shape, 70, 3), calibrated(shape)
    payload = Payload.of(kv, header_of(kv), codec=codec)
    assert payload.split(1) == [payload]
    assert not CompactFormat.by_layer


@pytest.fixture
def engine_of(tmp_path, monkeypatch):
    """Engines of tiny models that learn from a few texts."""
    monkeypatch.setattr(calibration, "TOKENS", 500)
    made = []

    def make(folder="a", architecture="llama", **options) -> A3Engine:
        engine = A3Engine.from_pretrained(
            tiny_model(architecture),
            tiny_tokenizer(),
            cache_dir=tmp_path / folder,
            stand_in=STAND_IN,
            **options,
        )
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close()


def answer(engine: A3Engine):
    return engine.generate(QUESTION, chunks=[DOCUMENT, DOCUMENT[::-1]], max_new_tokens=4)


@pytest.mark.parametrize(
    ("name", "architecture"), [*((name, "llama") for name in STRENGTHS), ("compact", "gemma3")]
)
def test_a_miss_answers_as_a_hit_and_as_a_new_engine(engine_of, name, architecture):
    engine = engine_of(codec=name, architecture=architecture)
    first, again = answer(engine), answer(engine)
    assert (first.report.misses, again.report.hits) == (2, 2)
    assert first.report.bytes_written == again.report.bytes_read > 0
    engine.close()
    later = answer(engine_of(codec=name, architecture=architecture))
    assert later.report.hits == 2
    assert first.text == again.text == later.text


def test_a_store_holds_several_codecs_each_under_keys_of_its_own(engine_of):
    engines = [engine_of(codec=name) for name in ("raw", *STRENGTHS)]
    assert len({engine.fingerprint for engine in engines}) == len(engines)
    for engine in engines:
        assert answer(engine).report.misses == 2
        assert answer(engine).report.hits == 2
    codecs = [read_header(path).codec for _, path in engines[0].runtime.store.entries()]
    assert codecs.count(BASIS) == len(STRENGTHS)
    assert engines[0].verify() == []


def basis_file(engine: A3Engine):
    for row, path in engine.runtime.store.entries():
        if read_header(path).codec == BASIS:
            return row.key, path
    raise AssertionError("there is no basis")


@pytest.mark.parametrize("how", ["cut", "flipped", "gone", "another model's"])
def test_a_damaged_basis_is_refused_and_made_anew(engine_of, how):
    """Chunks by another one are misses: their keys name the basis that they need."""
    engine = engine_of(codec="compact")
    right = answer(engine).text
    key, path = basis_file(engine)
    content = bytearray(path.read_bytes())
    store = engine.runtime.store
    if how == "gone":
        store.discard([key])
    elif how == "another model's":  # sealed rightly, under this one's name
        other = engine_of("b", codec="compact-small")
        _, foreign = basis_file(other)
        header = read_header(path)
        tensors = store.get(header).tensors
        theirs = other.runtime.store.get(read_header(foreign)).tensors
        assert not all(torch.equal(tensors[n], theirs[n]) for n in tensors)
        store.put(Payload(header, theirs))
    elif how == "cut":
        path.write_bytes(content[:-100])
    else:
        content[-100] ^= 1
        path.write_bytes(content)
    engine.close()
    later = engine_of(codec="compact")
    reply = answer(later)
    if how == "another model's":
        assert reply.report.misses == 2  # no chunk by the right basis is read by the wrong one
    else:
        assert reply.text == right
    assert basis_file(later)
    assert later.verify() == []


def test_a_second_machine_takes_the_basis_from_the_shared_store(engine_of, tmp_path):
    store = StoreOptions(f"file://{tmp_path}/shared")
    first = engine_of("a", codec="compact", store=store)
    text = answer(first).text
    second = engine_of("b", codec="compact", store=store)
    assert second.fingerprint == first.fingerprint
    reply = answer(second)
    assert (reply.report.hits, reply.text) == (2, text)


def test_the_basis_outlives_the_chunks_that_need_it(engine_of):
    """A store that is too small drops chunks, not what all of them are read by."""
    engine = engine_of(codec="compact")
    engine.precompute([DOCUMENT], progress=False)
    nbytes = engine.stats().nbytes
    engine.close()
    small = engine_of(codec="compact", size_limit=nbytes + 20_000)
    for number in range(12):
        small.precompute([f"{number} {DOCUMENT} {number}"], progress=False)
    assert basis_file(small)


def test_the_memory_tier_keeps_what_was_decoded(engine_of):
    """Only the first read decodes; the tier stays within its bytes."""
    engine = engine_of(codec="compact", store=StoreOptions(memory_limit=300_000))
    library = engine.runtime.library
    [segment] = engine.runtime.planner.segments([DOCUMENT])
    first = library.fetch(segment).kv
    again, once_more = library.fetch(segment).kv, library.fetch(segment).kv
    assert torch.equal(first.keys, again.keys)
    assert again.keys.data_ptr() == once_more.keys.data_ptr()
    for number in range(30):
        engine.precompute([f"{number} {DOCUMENT}"], progress=False)
        library.fetch(*engine.runtime.planner.segments([f"{number} {DOCUMENT}"]))
    memory = library.store._tiers[0]
    assert 0 < memory.stats().nbytes <= 300_000


def test_changed_weights_have_a_basis_of_their_own(engine_of):
    engine = engine_of(codec="compact")
    before = answer(engine), engine.fingerprint
    with torch.no_grad():
        engine.runtime.model.get_input_embeddings().weight.mul_(1.5)
    assert engine.fingerprint != before[1]
    assert answer(engine).report.misses == 2
    codecs = [read_header(path).codec for _, path in engine.runtime.store.entries()]
    assert codecs.count(BASIS) == 2
