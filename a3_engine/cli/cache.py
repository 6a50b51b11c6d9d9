"""`a3 cache`: look into the chunk store, check it, empty it, carry it, fill it."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path

from tqdm.auto import tqdm

from a3_engine.chunks.archive import export_chunks, import_chunks
from a3_engine.chunks.codecs import CODEC_NAMES, DEFAULT_CODEC
from a3_engine.chunks.codecs.compact import BASIS
from a3_engine.chunks.doctor import check_model
from a3_engine.chunks.known import About
from a3_engine.chunks.library import HEAD_TOKENS
from a3_engine.chunks.payload import DamagedPayload, claims, read_header, read_start
from a3_engine.chunks.stand_in import AUTO, NONE
from a3_engine.chunks.store import SECRET_VARIABLE, StoreOptions
from a3_engine.chunks.tiers.disk import DiskStore
from a3_engine.cli.options import STAND_IN_HELP, stand_in
from a3_engine.cli.reading import documents, folder, nbytes, seconds
from a3_engine.engine import A3Engine
from a3_engine.errors import UnsupportedModelError
from a3_engine.model.gguf import DEMO_MODEL
from a3_engine.model.loading import default_cache_dir
from a3_engine.prompt import Chunk


def add(commands: argparse._SubParsersAction) -> None:
    """The command's options."""
    cache = commands.add_parser("cache", help="look into the chunk store, check, carry or fill it")
    actions = cache.add_subparsers(required=True, metavar="ACTION")

    def action(name: str, run: object, text: str) -> argparse.ArgumentParser:
        parser = actions.add_parser(name, help=text, description=text)
        parser.add_argument("--cache-dir", type=folder, help="the engine's; the user's if absent")
        parser.set_defaults(run=run)
        return parser

    stats = action("stats", show_stats, "entries, bytes and codecs")
    stats.add_argument("--json", action="store_true")
    listing = action("ls", show_entries, "every chunk, the least recently used first")
    listing.add_argument("--tag", help="only chunks with this tag")
    listing.add_argument("--json", action="store_true", help="one JSON line a chunk")
    verify = action("verify", run_verify, "read everything and compare checksums")
    verify.add_argument("--fix", action="store_true", help="remove what is damaged")
    evict = action("evict", run_evict, "remove chunks")
    which = evict.add_mutually_exclusive_group(required=True)
    which.add_argument("--tag", help="those with this tag, and their texts")
    which.add_argument("--older-than", type=seconds, metavar="AGE", help="unused for 30m, 12h, 7d")
    which.add_argument("--to-size", type=nbytes, metavar="SIZE", help="down to 500M, 20G, ...")
    export = action("export", run_export, "write chunks into an archive for another machine")
    export.add_argument("archive", type=Path)
    export.add_argument("--tag", help="only chunks with this tag")
    take = action("import", run_import, "take over an archive's chunks, each after its checks")
    take.add_argument("archive", type=Path)
    take.add_argument("--size-limit", type=nbytes, metavar="SIZE")
    warm = action("warm", run_warm, "compute and store documents; go on after an interruption")
    warm.add_argument(
        "folder",
        type=Path,
        help="every .txt, .md and .rst file is one chunk, every line of a .jsonl file one with "
        'its "text"; tagged with the path in the folder',
    )
    warm.add_argument("--model", default=DEMO_MODEL, help="hub id, folder, GGUF file")
    warm.add_argument("--dtype", help="bfloat16 or float32; the machine's default if absent")
    warm.add_argument("--codec", default=DEFAULT_CODEC, choices=CODEC_NAMES)
    warm.add_argument("--encode-prefix", default="template", help="what chunks are computed after")
    warm.add_argument("--stand-in", type=stand_in, default=AUTO, help=STAND_IN_HELP)
    warm.add_argument("--size-limit", type=nbytes, metavar="SIZE")
    warm.add_argument("--store", help="URL of a shared store")
    doctor = action("doctor", run_doctor, "examine the folder, the index and the shared store")
    doctor.add_argument("--store", help="URL of a shared store")


def show_stats(options: argparse.Namespace) -> None:
    """Print what the store holds."""
    store = _read(options)
    stats = store.stats()
    codecs: Counter[str] = Counter()
    stand_ins: Counter[str] = Counter()
    tokens = chunks = of_chunks = 0
    for _, path in store.entries():
        try:
            header, about = claims(read_start(path))
        except DamagedPayload:
            codecs["damaged"] += 1
            continue
        codecs[header.codec] += 1
        if header.codec == BASIS:
            continue
        stand_ins[header.stand_in or NONE] += 1
        tokens += header.n_tokens
        known = About.from_json(about).known is not None
        chunks += known
        if known or header.n_tokens <= HEAD_TOKENS:  # each chunk has a head
            of_chunks += path.stat().st_size
    free = max(0, stats.size_limit - stats.nbytes)
    figures = {
        "directory": stats.directory,
        "entries": stats.entries,
        "nbytes": stats.nbytes,
        "chunks": chunks,
        "room": free * chunks // max(1, of_chunks),
        "tokens": tokens,
        "codecs": dict(codecs),
        "stand_ins": dict(stand_ins),
    }
    if options.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:10} {value}")
        room = f"; room for {figures['room']:,} more like them" if chunks else ""
        print(f"{chunks:,} chunks, {stats.nbytes / 1e6:,.1f} MB{room}")
    store.close()


def show_entries(options: argparse.Namespace) -> None:
    """Print one line for every chunk."""
    store = _read(options)
    for row, path in store.entries():
        if options.tag is not None and options.tag not in row.tags:
            continue
        try:
            header = read_header(path)
            what = {
                "tokens": header.n_tokens,
                "codec": header.codec,
                "engine": header.engine[:12],
                "stand_in": header.stand_in or NONE,
            }
        except DamagedPayload as error:
            what = {"damaged": str(error)}
        line = {
            "key": row.key,
            "nbytes": row.nbytes,
            "used": row.used,
            "tags": row.tags,
            **what,
        }
        if options.json:
            print(json.dumps(line))
        else:
            used = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row.used))
            rest = "  ".join(f"{name} {value}" for name, value in what.items())
            # A tag is somebody's text: nothing in it may reach the terminal but letters.
            tags = ", ".join(json.dumps(tag)[1:-1] for tag in row.tags)
            print(f"{row.key[:16]}  {row.nbytes:>12}  {used}  {rest}  {tags}")
    store.close()


def run_verify(options: argparse.Namespace) -> int:
    """Print what is damaged; status 1 where something is, and stays."""
    store = _open(options) if options.fix else _read(options)
    problems = store.verify(fix=options.fix)
    store.close()
    for problem in problems:
        print(problem)
    fixed = " and removed" if options.fix and problems else ""
    print(f"{len(problems)} problems found{fixed}.")
    return 1 if problems and not options.fix else 0


def run_evict(options: argparse.Namespace) -> None:
    """Remove chunks and say how many."""
    store = _open(options)
    if options.tag is not None:
        gone = store.evict(options.tag)
    elif options.older_than is not None:
        gone = store.evict_unused(time.time() - options.older_than)
    else:
        gone = store.shrink(options.to_size)
    store.close()
    print(f"{len(gone)} chunks removed.")


def run_export(options: argparse.Namespace) -> None:
    """Write an archive."""
    store = _read(options)
    with tqdm(total=store.stats().entries, desc="Exporting", unit="chunk") as bar:
        count = export_chunks(
            store, options.archive, options.tag, StoreOptions().secret, bar.update
        )
    store.close()
    print(f"{count} chunks written to {options.archive}.")


def run_import(options: argparse.Namespace) -> int:
    """Read an archive; status 1 where something in it was refused."""
    store = _store(options, options.size_limit)
    with tqdm(desc="Importing", unit="chunk") as bar:
        count, refused = import_chunks(store, options.archive, StoreOptions().secret, bar.update)
    store.close()
    for reason in refused:
        print(f"refused {reason}")
    print(f"{count} chunks taken over, {len(refused)} refused.")
    if StoreOptions().secret is None and count:
        print(
            "They are unsigned: whoever made the archive decided what they hold. "
            f"Set {SECRET_VARIABLE} on both machines to take over your own only."
        )
    return 1 if refused else 0


def run_warm(options: argparse.Namespace) -> int:
    """Compute what is not stored yet; status 1 where the store cannot hold it."""
    chunks = [Chunk(text, tag) for text, tag in documents(options.folder)]
    engine = A3Engine.from_pretrained(
        options.model,
        dtype=options.dtype,
        cache_dir=options.cache_dir,
        encode_prefix=options.encode_prefix,
        stand_in=options.stand_in,
        size_limit=options.size_limit,
        codec=options.codec,
        store=options.store,
    )
    if engine.unsupported_reason:
        raise UnsupportedModelError(
            f"Chunks of {options.model} cannot be stored: {engine.unsupported_reason}."
        )
    done = engine.precompute(chunks)
    engine.close()
    dropped = f" {done.dropped} are not stored any more." if done.dropped else ""
    print(f"{done.computed} chunks computed, {done.present} were stored before.{dropped}")
    return 1 if done.dropped else 0


def run_doctor(options: argparse.Namespace) -> int:
    """Print one line for every finding; status 1 where something needs a hand."""
    findings = check_model(_folder(options), options.store)
    for finding in findings:
        print(f"{'ok  ' if finding.good else 'WARN'} {finding.text}")
    return 0 if all(finding.good for finding in findings) else 1


def _folder(options: argparse.Namespace) -> Path:
    return (options.cache_dir or default_cache_dir()).expanduser()


def _open(options: argparse.Namespace) -> DiskStore:
    """The store, which has to be there."""
    _folder_of_chunks(options)
    return _store(options)


def _folder_of_chunks(options: argparse.Namespace) -> None:
    if not (_folder(options) / "chunks").is_dir():
        raise ValueError(f"There is no chunk store in {_folder(options)}; see --cache-dir.")


def _read(options: argparse.Namespace) -> DiskStore:
    """The store, which has to be there and stays as it is."""
    _folder_of_chunks(options)
    return _store(options, readonly=True)


def _store(
    options: argparse.Namespace, size_limit: int | None = None, *, readonly: bool = False
) -> DiskStore:
    place, secret = _folder(options) / "chunks", StoreOptions().secret
    return DiskStore(place, size_limit, secret=secret, readonly=readonly)
