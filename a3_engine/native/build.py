"""The C++ beside this file as libraries, compiled once a user, version and kind.

torch has no quick operation for a few loops: attention of one token over a long cache, of scattered
rows, turning keys while they are copied, and moving tokens that follow others. On Linux, where the
CPU has AVX512 and there is a `g++`, they are compiled on first use, in a thread that no answer
waits for; until then, and anywhere else, torch's operations do the same, more slowly. The entropy
coder's loops are a library of their own, for any CPU; numpy does the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait
from pathlib import Path

import torch
from platformdirs import user_cache_path

from a3_engine.owners import why_not_ours_alone
from a3_engine.processes import Lock, end_at_exit, make_anew_in_child

logger = logging.getLogger(__name__)

SWITCH = "A3_NATIVE"  # set to 0, everything is left to torch
SOURCES = ("attention.cpp", "placing.cpp", "shifting.cpp")
HEADERS = ("element.h", "tiles.h")
CODER = "coder"
CODER_SOURCES = ("coding.cpp",)
ANY_CPU = ("-std=c++17", "-O3", "-shared", "-fPIC", "-fopenmp")
FLAGS = (*ANY_CPU, "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
TIMEOUT_S = 60
ANSWER_S = 5  # to say its version; one that waits for a licence or a network is left alone

Kind = torch.dtype | str  # of states, or CODER


class Background:
    """What is found or compiled, each in a thread of its own, and at exit given up."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._begun: dict[Kind, tuple[threading.Thread, Future[ctypes.CDLL | None]]] = {}
        self._compiling: set[subprocess.Popen[str]] = set()
        self.ends = False
        make_anew_in_child(self._renew)
        end_at_exit(self._end)

    def library(self, kind: Kind) -> Future[ctypes.CDLL | None]:
        """Of the loops for a dtype or of the coder, begun by whoever asks first."""
        if (known := self._begun.get(kind)) is not None:
            return known[1]
        with self._lock:
            if kind not in self._begun:
                result: Future[ctypes.CDLL | None] = Future()
                thread = threading.Thread(
                    target=lambda: result.set_result(made(kind)), name="a3-loops", daemon=True
                )
                self._begun[kind] = thread, result
                thread.start()
            return self._begun[kind][1]

    @contextlib.contextmanager
    def running(self, process: subprocess.Popen[str]) -> Iterator[None]:
        """For as long as a compiler runs: a program that ends takes it along."""
        self._compiling.add(process)
        try:
            yield
        finally:
            self._compiling.discard(process)

    def _renew(self) -> None:
        self._compiling.clear()  # they are the parent's, and so are the threads
        self._begun = {kind: each for kind, each in self._begun.items() if each[1].done()}

    def _end(self) -> None:
        self.ends = True
        for process in list(self._compiling):
            _kill(process)
        for thread, _ in self._begun.values():
            thread.join(1)  # it removes what was half made


BACKGROUND = Background()


def library(kind: Kind, seconds: float | None = 0.0) -> ctypes.CDLL | None:
    """The compiled loops for states of this dtype, or the coder's; None where, or as long as, there
    are none.

    Parameters
    ----------
    seconds : float or None
        How long to wait for them at most; None is as long as it takes.
    """
    found = BACKGROUND.library(kind)
    if not found.done():
        wait([found], seconds)
    return found.result() if found.done() else None


def made(kind: Kind) -> ctypes.CDLL | None:
    """Found or compiled now; None where they cannot be had, which is logged."""
    if os.environ.get(SWITCH) == "0" or not _fits_machine(kind):
        return None
    # Another compiler's OpenMP would bring threads of its own, beside torch's.
    compiler = shutil.which("g++")
    if compiler is None:
        logger.warning(
            "There is no g++: %s, which is slower on this CPU. Install one, or set %s=0.",
            _otherwise(kind),
            SWITCH,
        )
        return None
    try:
        sources = CODER_SOURCES if kind == CODER else SOURCES
        path = _compiled(compiler, _flags(kind), sources)
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # sound, but not for this system any more
            path.unlink()
            return ctypes.CDLL(str(_compiled(compiler, _flags(kind), sources)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        if BACKGROUND.ends:
            return None
        detail = getattr(error, "stderr", None) or error
        logger.warning("The native loops cannot be used, so %s: %s", _otherwise(kind), detail)
        return None


def _otherwise(kind: Kind) -> str:
    return f"{'compact chunks are' if kind == CODER else 'attention is'} left to torch"


def _fits_machine(kind: Kind) -> bool:
    """Whether the loops were written for it; in bf16 with AMX, torch does other things."""
    if sys.platform != "linux":
        return False
    if kind == CODER:
        return True
    if not torch.cpu._is_avx512_supported():
        return False
    amx = torch.cpu._is_amx_tile_supported()
    return kind == torch.float32 or (kind == torch.bfloat16 and not amx)


def _flags(kind: Kind) -> tuple[str, ...]:
    if kind == CODER:
        return ANY_CPU
    if kind == torch.float32:
        return (*FLAGS, "-DA3_FP32")
    return (*FLAGS, "-mavx512bf16") if torch.cpu._is_avx512_bf16_supported() else FLAGS


def _compiled(compiler: str, flags: tuple[str, ...], sources: tuple[str, ...] = SOURCES) -> Path:
    here = Path(__file__).parent
    version = _run([compiler, "--version"], ANSWER_S)
    hasher = hashlib.sha256(f"{version} {flags}".encode())
    for name in sources + HEADERS:
        hasher.update((here / name).read_bytes())
    folder = user_cache_path("a3") / "native"
    path = folder / f"{hasher.hexdigest()[:24]}.so"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _refuse_others(folder)
    digest = path.with_suffix(".sha256")
    if path.exists():
        _refuse_others(path)
        # One that a power cut has shortened would end the process, not raise an error.
        if digest.exists() and digest.read_text("ascii", "replace") == _sha256(path):
            return path
    logger.info("Compiling the native loops into %s, once.", folder)
    # Whoever comes first wins; others replace it by the same.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made, said = Path(scratch) / path.name, Path(scratch) / digest.name
        _run(
            [compiler, *flags, "-o", str(made), *(str(here / name) for name in sources)], TIMEOUT_S
        )
        made.chmod(0o700)
        said.write_text(_sha256(made))
        for file, place in ((made, path), (said, digest)):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
            file.replace(place)
    return path


def _run(command: list[str], timeout: float) -> str:
    """What a command prints; one that takes longer ends with all that it has started."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
        errors="replace",
    )
    try:
        with BACKGROUND.running(process):
            printed, complaint = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        _kill(process)
        process.communicate()
        raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, printed, complaint)
    return printed


def _kill(process: subprocess.Popen[str]) -> None:
    """With all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _refuse_others(path: Path) -> None:
    """Code is loaded only from where nobody else can write."""
    if (why := why_not_ours_alone(path)) is not None:
        raise OSError(why)
