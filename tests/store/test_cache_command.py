"""`a3 cache`, as a user types it."""

from __future__ import annotations

import io
import json
import os
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from a3_engine import A3Engine
from a3_engine.chunks.archive import import_chunks
from a3_engine.chunks.text_index import TextIndex
from a3_engine.chunks.tiers.disk import DiskStore
from a3_engine.cli import main
from tests.store.stored import header, holds, payload, payloads
from tests.tiny import tiny_model, tiny_tokenizer

TEXT = "A text that is long enough to be found again in a prompt."


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache folder with three chunks and a text."""
    store = DiskStore(tmp_path / "cache" / "chunks")
    for seed, tag in ((1, "a"), (2, "a"), (3, None)):
        store.put(payload(seed), tag)
    text_index = TextIndex(store, "engine")
    text_index.add([(TEXT, header(1).key, "a")])
    text_index.write()
    store.close()
    return tmp_path / "cache"


def run(*arguments: object) -> int:
    return main(["cache", *map(str, arguments)])


def opened(folder: Path) -> DiskStore:
    return DiskStore(folder / "chunks")


def test_stats_and_ls_say_what_there_is(cache, capsys):
    assert run("stats", "--json", "--cache-dir", cache) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["entries"], figures["tokens"], figures["codecs"]) == (3, 15, {"raw": 3})
    assert run("ls", "--json", "--tag", "a", "--cache-dir", cache) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["key"], line["tokens"]) for line in lines] == [
        (header(seed).key, 5) for seed in (1, 2)
    ]
    assert run("ls", "--cache-dir", cache) == run("stats", "--cache-dir", cache) == 0
    assert header(3).key[:16] in capsys.readouterr().out


def test_verify_reports_and_with_fix_removes(cache, capsys):
    store = opened(cache)
    path = payloads(store)[1]
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    store.close()
    for _ in range(2):
        assert run("verify", "--cache-dir", cache) == 1
        assert header(2).key in capsys.readouterr().out
    assert run("verify", "--fix", "--cache-dir", cache) == 0
    capsys.readouterr()
    assert run("verify", "--cache-dir", cache) == 0
    assert "0 problems" in capsys.readouterr().out
    store = opened(cache)
    assert [holds(store, seed) for seed in (1, 2, 3)] == [True, False, True]
    store.close()


def test_evict_by_tag_age_and_size(cache, capsys):
    assert run("evict", "--tag", "a", "--cache-dir", cache) == 0
    assert "2 chunks" in capsys.readouterr().out
    assert TextIndex(opened(cache), "engine").find(TEXT) == []
    assert run("evict", "--older-than", "1h", "--cache-dir", cache) == 0
    assert opened(cache).stats().entries == 1
    assert run("evict", "--to-size", "1K", "--cache-dir", cache) == 0
    assert opened(cache).stats().entries == 0
    store = opened(cache)
    store.put(payload(4))
    store.close()
    assert run("evict", "--older-than", "0s", "--cache-dir", cache) == 0
    assert opened(cache).stats().entries == 0


@pytest.mark.parametrize(
    "arguments", [("evict",), ("evict", "--older-than", "soon"), ("evict", "--to-size", "big")]
)
def test_unclear_evictions_are_refused(cache, arguments):
    with pytest.raises(SystemExit):
        run(*arguments, "--cache-dir", cache)
    assert opened(cache).stats().entries == 3


def test_an_archive_carries_chunks_tags_and_texts(cache, tmp_path, capsys):
    archive, other = tmp_path / "corpus.tar", tmp_path / "other"
    assert run("export", archive, "--cache-dir", cache) == 0
    for _ in range(2):  # also over what is there already
        assert run("import", archive, "--cache-dir", other) == 0
    assert "3 chunks taken over, 0 refused" in capsys.readouterr().out
    store = opened(other)
    assert all(holds(store, seed) for seed in (1, 2, 3))
    text_index = TextIndex(store, "engine")
    assert len(text_index.find(TEXT)) == 1
    assert store.evict("a") == {header(1).key, header(2).key}
    assert text_index.find(TEXT) == []
    store.close()


def test_an_archive_of_one_tag_has_only_that(cache, tmp_path, capsys):
    archive = tmp_path / "a.tar"
    assert run("export", archive, "--tag", "a", "--cache-dir", cache) == 0
    assert run("import", archive, "--cache-dir", tmp_path / "other") == 0
    assert "2 chunks taken over" in capsys.readouterr().out


def build(archive: Path, members: list[tuple[tarfile.TarInfo, bytes]], texts: object) -> Path:
    text = json.dumps(texts).encode()
    with tarfile.open(archive, "w") as tar:
        for member, content in [*members, (tarfile.TarInfo("texts.json"), text)]:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return archive


def test_a_hostile_archive_gives_nothing_and_writes_nothing_outside(tmp_path):
    """Names that climb, links, devices, swapped names, damaged and cut payloads, odd texts."""
    good, secret = payload(1).to_bytes(), tmp_path / "secret"
    secret.write_bytes(good)
    link = tarfile.TarInfo(f"{header(1).key}.safetensors")
    link.type, link.linkname = tarfile.SYMTYPE, str(secret)
    device = tarfile.TarInfo(f"{header(1).key}.safetensors")
    device.type = tarfile.FIFOTYPE
    members = [
        (tarfile.TarInfo("../../escaped.safetensors"), good),
        (tarfile.TarInfo(str(tmp_path / "absolute.safetensors")), good),
        (tarfile.TarInfo(f"{header(2).key}.safetensors"), good),
        (tarfile.TarInfo(f"{header(1).key}.safetensors"), good[:-3]),
        (tarfile.TarInfo(f"{header(1).key}.safetensors"), good[:-1] + b"\x7f"),
        (tarfile.TarInfo(f"{header(1).key}.safetensors"), b"\x80\x04N."),
        (link, b""),
        (device, b""),
    ]
    text = ["a" * 64, 40, "x" * 32, 5]
    odd = [text[:3], [*text, 1], ["a", *text[1:]], [*text[:3], "y" * 32], [*text[:3], 2**70]]
    odd.append([text[0], 2**70, *text[2:]])
    rows = [None, 5, [], ["e"] * 3, ["e", "k", text], *(["e", "0" * 64, row] for row in odd)]
    archive = build(tmp_path / "evil.tar", members, {"tags": {"x": "t"}, "texts": rows})
    before = sorted(tmp_path.parent.rglob("*"))
    store = opened(tmp_path / "c")
    count, refused = import_chunks(store, archive)
    assert (count, len(refused)) == (0, len(members))
    assert store.stats().entries == 0
    assert store.text_rows() == []
    new = set(tmp_path.parent.rglob("*")) - set(before)
    assert all(path.is_relative_to(tmp_path / "c") for path in new)
    store.close()


@pytest.mark.parametrize("content", [b"", b"no archive", b"\0" * 1024])
def test_what_is_no_archive_says_so(tmp_path, content, capsys):
    (tmp_path / "file").write_bytes(content)
    assert run("import", tmp_path / "file", "--cache-dir", tmp_path / "c") == 1
    assert "file" in capsys.readouterr().err or content == b"\0" * 1024


def test_archives_of_other_holders_are_refused(cache, tmp_path, monkeypatch, capsys):
    """With a secret, only chunks sealed by it are taken over."""
    archive = tmp_path / "corpus.tar"
    assert run("export", archive, "--cache-dir", cache) == 0
    monkeypatch.setenv("A3_STORE_SECRET", "a secret of this test")
    assert run("import", archive, "--cache-dir", tmp_path / "other") == 1
    assert "0 chunks taken over, 3 refused" in capsys.readouterr().out


def test_warm_computes_a_folder_once(tmp_path, capsys):
    """Text and JSON lines; a second run, or one after an interruption, computes the rest."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    documents = tmp_path / "documents"
    (documents / "deep").mkdir(parents=True)
    (documents / "one.txt").write_text("The lamp burns through the night.", encoding="utf-8")
    (documents / "deep" / "two.md").write_text("The keeper sleeps at noon.", encoding="utf-8")
    (documents / "picture.png").write_bytes(b"\x89PNG")
    arguments = ["warm", documents, "--model", tmp_path / "model", "--dtype", "float32"]
    arguments += ["--codec", "int8", "--cache-dir", tmp_path / "cache"]
    assert run(*arguments) == 0
    assert "2 chunks computed, 0 were stored" in capsys.readouterr().out
    lines = [json.dumps({"text": f"Line {n} of the harbour's log."}) for n in range(3)]
    (documents / "log.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert run(*arguments) == 0
    assert "3 chunks computed, 2 were stored" in capsys.readouterr().out
    store = opened(tmp_path / "cache")
    assert {tag for row, _ in store.entries() for tag in row.tags} >= {
        "one.txt",
        "deep/two.md",
        "log.jsonl",
    }
    store.close()
    (tmp_path / "stand_in.txt").write_text("The lamp.\n\nA keeper.\n", encoding="utf-8")
    after = ["--stand-in", tmp_path / "stand_in.txt"]
    assert run(*arguments, *after) == 0
    assert "5 chunks computed, 0 were stored" in capsys.readouterr().out
    engine = A3Engine.from_pretrained(
        tmp_path / "model",
        dtype="float32",
        codec="int8",
        cache_dir=tmp_path / "cache",
        stand_in=["The lamp.", "A keeper."],
    )
    chunks = ["The lamp burns through the night.", "The keeper sleeps at noon."]
    report = engine.generate("Who sleeps?", chunks=chunks, max_new_tokens=2).report
    engine.close()
    assert (report.hits, report.misses) == (2, 0)
    run("ls", "--json", "--cache-dir", tmp_path / "cache")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["stand_in"] for line in lines].count(report.stand_in) == 5
    with pytest.raises(SystemExit):
        run(*arguments, "--stand-in", tmp_path / "nowhere.txt")
    assert "nowhere.txt" in capsys.readouterr().err
    assert run("warm", tmp_path / "nowhere") == 1
    assert "nowhere" in capsys.readouterr().err


def test_doctor_names_what_is_wrong(cache, capsys):
    assert run("doctor", "--cache-dir", cache) == 0
    assert "all checksums agree" in capsys.readouterr().out
    os.chmod(cache / "chunks", 0o755)
    store = payloads(opened(cache))
    os.chmod(cache / "chunks", 0o755)
    store[0].write_bytes(b"damaged")
    assert run("doctor", "--cache-dir", cache, "--store", "nonsense://x") == 1
    out = capsys.readouterr().out
    assert out.count("WARN") == 4
    assert "mode 755" in out
    assert "1 damaged" in out
    assert "nonsense" in out
    assert run("doctor", "--cache-dir", cache.parent / "nowhere") == 1


def test_a_folder_without_a_store_says_so_and_stays_as_it_is(tmp_path, capsys):
    for command in (["stats"], ["ls"], ["verify"], ["evict", "--tag", "x"]):
        assert run(*command, "--cache-dir", tmp_path / "none") == 1
        assert "no chunk store in" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("import", "x.tar", "--size-limit", "9" * 400),
        ("import", "x.tar", "--size-limit", "9" * 17 + "T"),
        ("evict", "--to-size", "1e9"),
        ("evict", "--older-than", "9" * 400 + "d"),
        ("stats", "--cache-dir", "~nosuchuser/x"),
        ("stats", "--cache-dir", "a\0b"),
    ],
)
def test_arguments_that_cannot_be_are_refused_in_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        run(*arguments)
    assert left.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "line", ['{"title": "x"}', '{"text": 5}', "[]", '"text"', "{", '{"text": null}', "\\ud800"]
)
def test_lines_without_text_are_named_by_file_and_number(tmp_path, capsys, line):
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "log.jsonl").write_text(f'{{"text": "A sound line."}}\n\n{line}\n')
    assert run("warm", documents, "--cache-dir", tmp_path / "c") == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "log.jsonl, line 3" in error


def test_a_file_that_is_no_text_is_named(tmp_path, capsys):
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "a.txt").write_bytes(b"M\xfcnchen")
    assert run("warm", tmp_path / "documents", "--cache-dir", tmp_path / "c") == 2
    assert "a.txt" in capsys.readouterr().err


@pytest.mark.parametrize("size", [8 * 2**30, 2**40, 2**63])
def test_an_archive_whose_headers_claim_any_size_makes_no_room(tmp_path, capsys, size):
    """A pax header that says 8 GiB, in a file of some hundred bytes."""
    header_of = tarfile.TarInfo("pax")
    header_of.type = tarfile.XHDTYPE
    header_of.size = min(size, 8 * 2**30 - 1)
    block = bytearray(header_of.tobuf(tarfile.USTAR_FORMAT))
    if size >= 8 * 2**30:  # in base 256
        block[124:136] = b"\x80" + size.to_bytes(11, "big")
        block[148:156] = b"        "
        block[148:156] = b"%06o\0 " % sum(block)
    (tmp_path / "x.tar").write_bytes(bytes(block) + b"30 path=x\n" * 20)
    tracemalloc.start()
    assert run("import", tmp_path / "x.tar", "--cache-dir", tmp_path / "c") == 1
    assert tracemalloc.get_traced_memory()[1] < 50 * 2**20
    tracemalloc.stop()
    assert len(capsys.readouterr().err.strip().splitlines()[-1]) > 10
