"""GGUF files: unpacked once, checked at every start, and refused with a reason where broken."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import pytest
import torch
from transformers import LlamaConfig

from a3_engine import A3Engine, ModelLoadError
from a3_engine.model.gguf import MANIFEST, dequantized
from a3_engine.model.loading import load_model
from tests.tiny import SHAPE, tiny_model, tiny_tokenizer

MODEL = LlamaConfig(**{**SHAPE, "head_dim": 8})  # hidden size / heads, as the format expects


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return small_file(tmp_path)


def small_file(folder: Path) -> Path:
    """The tiny Llama model in fp32, as llama.cpp would write it."""
    model, tokenizer = tiny_model(MODEL), tiny_tokenizer()
    path = folder / "tiny.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(MODEL.max_position_embeddings)
    writer.add_embedding_length(MODEL.hidden_size)
    writer.add_block_count(MODEL.num_hidden_layers)
    writer.add_feed_forward_length(MODEL.intermediate_size)
    writer.add_head_count(MODEL.num_attention_heads)
    writer.add_head_count_kv(MODEL.num_key_value_heads)
    writer.add_layer_norm_rms_eps(MODEL.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    pieces = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_token_list(pieces)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(pieces))
    rules = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in rules])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, MODEL.num_hidden_layers)
    heads = {"q_proj": MODEL.num_attention_heads, "k_proj": MODEL.num_key_value_heads}
    for name, weight in model.state_dict().items():
        for projection, n in heads.items():
            if projection in name:  # the format pairs neighbouring components for rotation
                halves = weight.view(n, 2, -1, weight.shape[1])
                weight = halves.transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_unpacked_model_computes_what_the_packed_one_did(file, tmp_path):
    model, tokenizer = load_model(file, cache_dir=tmp_path, dtype=torch.float32)
    text = "The keeper of the harbour, every evening."
    assert tokenizer(text).input_ids == tiny_tokenizer()(text).input_ids
    ids = torch.arange(4, 40)[None]
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, tiny_model(MODEL)(ids).logits)


def test_an_engine_loads_a_file_on_first_use(file, tmp_path):
    engine = A3Engine.from_pretrained(file, cache_dir=tmp_path / "cache", dtype="float32")
    assert not (tmp_path / "cache").exists()
    chunk = "The lamp of the lighthouse burns through the night."
    reports = [engine.generate("Who?", chunks=[chunk], max_new_tokens=4).report for _ in range(2)]
    assert [report.hits for report in reports] == [0, 1]
    assert reports[0].model == str(file)
    engine.close()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", MANIFEST])
@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_unpacked_model_is_made_again(file, tmp_path, caplog, name, damage):
    """And a whole one is left as it is."""
    folder = dequantized(file, tmp_path)
    content = {path.name: path.read_bytes() for path in folder.iterdir()}
    stamp = (folder / MANIFEST).stat().st_mtime_ns
    assert dequantized(file, tmp_path) == folder
    assert (folder / MANIFEST).stat().st_mtime_ns == stamp
    assert "damaged" not in caplog.text
    (folder / name).unlink()
    if damage == "changed":
        (folder / name).write_bytes(content[name][:-1] + b" ")
    assert dequantized(file, tmp_path) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == content
    assert "damaged" in caplog.text


def _load_at_once(file: Path, tied: Path, cache_dir: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        folders = set(pool.map(lambda _: dequantized(file, cache_dir), range(3)))
    assert set((cache_dir / "models").iterdir()) == folders
    assert len(folders) == 1
    for path in (tied, file):
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda path: load_model(path, cache_dir=cache_dir), [path] * 3))
        load_model(tied, cache_dir=cache_dir)


def test_engines_may_start_at_once(file, tmp_path):
    """They leave one unpacked copy, and a process in which models with tied weights still load.

    In a process of its own, since loading in threads patches transformers for all that follows.
    """
    tiny_model(LlamaConfig(**SHAPE, tie_word_embeddings=True)).save_pretrained(tmp_path / "tied")
    tiny_tokenizer().save_pretrained(tmp_path / "tied")
    process = multiprocessing.get_context("spawn").Process(
        target=_load_at_once, args=(file, tmp_path / "tied", tmp_path / "cache")
    )
    process.start()
    process.join(120)
    assert process.exitcode == 0


def test_another_file_of_the_same_name_is_another_model(file, tmp_path):
    first = dequantized(file, tmp_path)
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    assert dequantized(file, tmp_path) != first


@pytest.mark.parametrize("broken", ["garbage", "empty", "half", "head"])
def test_a_broken_file_says_so(file, tmp_path, broken):
    """And leaves nothing after."""
    content = file.read_bytes()
    kept = {"garbage": b"no model at all" * 10, "empty": b"", "half": content[: len(content) // 2]}
    file.write_bytes(kept.get(broken, content[:21]))
    with pytest.raises(ModelLoadError, match=r"tiny\.gguf cannot be read"):
        load_model(file, cache_dir=tmp_path)
    assert list((tmp_path / "models").iterdir()) == []


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(ModelLoadError, match=r"no GGUF file at .*nowhere\.gguf"):
        load_model(tmp_path / "nowhere.gguf", cache_dir=tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelLoadError, match=r"(?s)'.*empty'.*\.gguf"):
        load_model(tmp_path / "empty", cache_dir=tmp_path)


def test_a_name_close_to_the_demo_models_is_not_looked_for_elsewhere(tmp_path):
    with pytest.raises(ModelLoadError, match="did you mean 'smollm2-135m-instruct'"):
        load_model("smollm2-135m", cache_dir=tmp_path)
    with pytest.raises(ModelLoadError, match="Check the path"):
        load_model("./nowhere", cache_dir=tmp_path)


def test_weights_that_others_may_have_written_are_not_run(file, tmp_path):
    """Planted before the first start, in a folder that everybody can write, with its own sums."""
    folder = dequantized(file, tmp_path / "cache")
    assert {path.stat().st_mode & 0o077 for path in (folder.parent, folder, *folder.iterdir())} == {
        0
    }
    weights = folder / "model.safetensors"
    for path, mode in ((folder.parent, 0o777), (folder, 0o777), (weights, 0o666)):
        before = path.stat().st_mode
        path.chmod(mode)
        with pytest.raises(ModelLoadError, match="others"):
            dequantized(file, tmp_path / "cache")
        path.chmod(before)
    if os.geteuid() == 0:
        os.chown(weights, 65534, 65534)
        with pytest.raises(ModelLoadError, match="others"):
            dequantized(file, tmp_path / "cache")
        os.chown(weights, 0, 0)
    assert dequantized(file, tmp_path / "cache") == folder
    elsewhere = folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(elsewhere)
    with pytest.raises(ModelLoadError, match="link"):
        dequantized(file, tmp_path / "cache")


def test_what_killed_programs_left_is_removed(file, tmp_path):
    """Each is as large as the model. While others unpack, nothing is."""
    left = tmp_path / "models" / ".unpacking-left"
    left.mkdir(parents=True)
    (left / "weights").write_bytes(b"half")
    other = os.open(left.parent, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_SH)
    folder = dequantized(file, tmp_path)
    assert left.exists()
    os.close(other)
    shutil.rmtree(folder)
    assert dequantized(file, tmp_path) == folder
    assert set(folder.parent.iterdir()) == {folder}
