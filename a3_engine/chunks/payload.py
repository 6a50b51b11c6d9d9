"""One stored chunk: encoded tensors under a header that says what they are, sealed as bytes.

Whatever comes back from a store is foreign until `open_file` or `open_bytes` has accepted it: the
header must be, to the letter, the one that the request expects, the tensors must have exactly the
names, shapes and dtypes that the header's codec gives them, and the checksum over all of it must
agree. With a secret, so must a keyed checksum (HMAC-SHA256), which only its holders can write.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import stat
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save

from a3_engine.chunks.codecs import CODECS, FORMATS
from a3_engine.chunks.codecs.base import Codec, Spec, Tensors
from a3_engine.chunks.fingerprint import FORMAT_VERSION
from a3_engine.kv import ChunkKV, Shape

MAX_HEADER = 64 * 2**10  # bytes; ours are below 2 KiB


@dataclass(frozen=True)
class Header:
    """What a payload must say of itself to be used for a request.

    ``shape`` is ``(layers, kv_heads, tokens, head_dim)`` of the decoded keys and values, ``dtype``
    theirs as torch prints it; ``value_dim`` is that of the values where it is another, and is left
    out where it is not. A part of a chunk begins at ``first_layer``. ``stand_in`` names the
    passages that it was computed after, and is left out where there were none.
    """

    key: str
    engine: str
    shape: Shape
    dtype: str
    codec: str
    first_layer: int = 0
    stand_in: str = ""
    value_dim: int = 0
    version: int = FORMAT_VERSION

    @property
    def n_tokens(self) -> int:
        return self.shape[2]

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype.removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype):
            raise DamagedPayload(f"its dtype is {self.dtype!r}")
        return dtype

    @property
    def shapes(self) -> tuple[Shape, Shape]:
        """Those of the decoded keys and values."""
        return self.shape, (*self.shape[:3], self.value_dim or self.shape[3])

    @property
    def layout(self) -> dict[str, Spec]:
        return FORMATS[self.codec].layout(*self.shapes, self.torch_dtype)

    @property
    def nbytes(self) -> tuple[int, int]:
        """The least and the most bytes that the encoded tensors can have."""
        each = [spec.nbytes for spec in self.layout.values()]
        return sum(least for least, _ in each), sum(most for _, most in each)

    def to_json(self) -> str:
        said = asdict(self)
        for optional in ("stand_in", "value_dim"):
            if not said[optional]:
                del said[optional]
        return json.dumps(said, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Header:
        """Raises `DamagedPayload` for anything that `to_json` cannot have written."""
        try:
            fields = json.loads(text)
            header = cls(**{**fields, "shape": tuple(fields["shape"])})
            sound = (
                header.to_json() == text
                and header.codec in FORMATS
                and len(header.shape) == 4
                and all(type(size) is int and size > 0 for size in header.shape)
                and type(header.value_dim) is int
                and header.value_dim >= 0
                and isinstance(header.torch_dtype, torch.dtype)
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DamagedPayload(f"its header cannot be read ({error})") from error
        if not sound:
            raise DamagedPayload("its header is of another format")
        return header

    def part(self, start: int, stop: int) -> Header:
        """The header of the layers from ``start`` to before ``stop``."""
        return replace(self, shape=(stop - start, *self.shape[1:]), first_layer=start)


class DamagedPayload(Exception):
    """The payload cannot be what was asked for."""


@dataclass(frozen=True)
class Payload:
    """A header, and the encoded tensors that it describes.

    ``about`` says whose KV it is, for an index that has to be made anew; see `known.About`. No
    request depends on it. ``decoded`` is what it decodes to, where somebody keeps that in memory.
    """

    header: Header
    tensors: Tensors
    about: str = ""
    decoded: ChunkKV | None = None

    @classmethod
    def of(
        cls, kv: ChunkKV, header: Header, about: str = "", codec: Codec | None = None
    ) -> Payload:
        """Encode a chunk; by the header's codec, which has to be given where it is calibrated."""
        return cls(header, (codec or CODECS[header.codec]).encode(kv), about)

    @property
    def nbytes(self) -> int:
        if self.decoded is not None:
            return self.decoded.nbytes
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def kv(self, codec: Codec | None = None) -> ChunkKV:
        """Decode, as `of` encodes. Do not write into it: it may be the store's memory."""
        if self.decoded is not None:
            return self.decoded
        header, codec = self.header, codec or CODECS[self.header.codec]
        return codec.decode(self.tensors, *header.shapes, header.torch_dtype)

    def on(self, device: torch.device) -> Payload:
        """The same with its tensors on a device, to be decoded there."""
        return replace(self, tensors={n: t.to(device) for n, t in self.tensors.items()})

    def to_bytes(self, secret: bytes | None = None) -> bytes:
        """A safetensors document."""
        metadata = {"a3": self.header.to_json(), "sha256": self.digest().hex()}
        if self.about:
            metadata["about"] = self.about
        if secret is not None:
            metadata["hmac"] = hmac.digest(secret, self.digest(), "sha256").hex()
        return save({name: t.contiguous() for name, t in self.tensors.items()}, metadata)

    def digest(self) -> bytes:
        """sha256 over the header, what it is about, and every byte of the tensors."""
        hasher = hashlib.sha256(self.header.to_json().encode())
        hasher.update(self.about.encode("utf-8", "surrogatepass"))
        by_layer = FORMATS[self.header.codec].by_layer
        for name, tensor in sorted(self.tensors.items()):
            if not by_layer:  # where the header does not tell the sizes
                hasher.update(f"{name} {list(tensor.shape)}".encode())
            if tensor.numel():
                hasher.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return hasher.digest()

    def split(self, nbytes: int) -> list[Payload]:
        """Groups of layers of at most ``nbytes`` each, but of one layer at least."""
        if not FORMATS[self.header.codec].by_layer:
            return [self]
        n_layers = self.header.shape[0]
        each = max(1, n_layers * nbytes // max(1, self.nbytes))
        return [
            Payload(
                self.header.part(start, min(start + each, n_layers)),
                {name: tensor[start : start + each] for name, tensor in self.tensors.items()},
                self.about,
            )
            for start in range(0, n_layers, each)
        ]


def open_file(path: Path, expected: Header, secret: bytes | None, *, hashed: bool) -> Payload:
    """A payload by memory mapping; its bytes are touched when the tensors are used.

    Parameters
    ----------
    hashed : bool
        This process has compared the file's checksum before and the file has not changed since. It
        is compared anyway where there is a secret, and the tensors are private copies then.

    Raises
    ------
    DamagedPayload
        It is not what is expected.
    """
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            raise DamagedPayload("it is not a plain file")
        with path.open("rb") as file:
            _check_size(file.read(8), found.st_size, expected)
        with safe_open(path, framework="pt", device="cpu") as document:
            metadata = document.metadata() or {}
            _check_header(metadata, expected)
            tensors = {name: document.get_tensor(name) for name in document.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise DamagedPayload(str(error)) from error
    _check_layout(tensors, expected)
    if secret is not None:
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    payload = Payload(expected, tensors, str(metadata.get("about", "")))
    if secret is not None or not hashed:
        _check_seal(payload, metadata, secret)
    return payload


def open_bytes(content: bytes, expected: Header, secret: bytes | None) -> Payload:
    """A payload that came over a network. Raises as `open_file` does."""
    try:
        length = _check_size(content[:8], len(content), expected)
        metadata = json.loads(content[8 : 8 + length]).get("__metadata__") or {}
        _check_header(metadata, expected)
        tensors = load(content)
    except (SafetensorError, ValueError, RuntimeError, AttributeError, RecursionError) as error:
        raise DamagedPayload(str(error)) from error
    except KeyError as error:
        raise DamagedPayload(f"it has a tensor of unknown dtype {error}") from error
    _check_layout(tensors, expected)
    payload = Payload(expected, tensors, str(metadata.get("about", "")))
    _check_seal(payload, metadata, secret)
    return payload


def join(header: Header, parts: list[bytes], secret: bytes | None) -> Payload:
    """A payload from its layer groups, in order. Raises as `open_file` does."""
    opened, start = [], 0
    for content in parts:
        claimed = claim(content)
        stop = start + claimed.shape[0]
        opened.append(open_bytes(content, header.part(start, stop), secret))
        start = stop
    if start != header.shape[0]:
        raise DamagedPayload(f"it has {start} of {header.shape[0]} layers")
    if len(opened) == 1:
        return replace(opened[0], header=header)
    names = opened[0].tensors
    whole = {n: torch.cat([part.tensors[n] for part in opened]) for n in names}
    return Payload(header, whole, opened[0].about)


def read_header(path: Path) -> Header:
    """What a file says of itself, unchecked. Raises as `open_file` does."""
    return claim(read_start(path))


def read_start(path: Path) -> bytes:
    """A file's first bytes, in which it says what it is. Raises as `open_file` does."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise DamagedPayload("it is not a plain file")
        with path.open("rb") as file:
            start = file.read(8)
            return start + file.read(min(int.from_bytes(start, "little"), MAX_HEADER))
    except OSError as error:
        raise DamagedPayload(str(error)) from error


def claim(content: bytes) -> Header:
    """What a document says of itself, unchecked. Raises as `open_file` does."""
    return claims(content)[0]


def claims(content: bytes) -> tuple[Header, str]:
    """What a document says of itself and of whose KV it is, unchecked; raises as `open_file`."""
    length = int.from_bytes(content[:8], "little")
    if length > MAX_HEADER:
        raise DamagedPayload("its header is too long")
    try:
        metadata = json.loads(content[8 : 8 + length])["__metadata__"]
        return Header.from_json(metadata["a3"]), str(metadata.get("about", ""))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DamagedPayload(f"its header cannot be read ({error})") from error


def _check_size(start: bytes, size: int, expected: Header) -> int:
    """Length of the document's header, when it and the file have the size that they must have."""
    length = int.from_bytes(start, "little")
    least, most = expected.nbytes
    if len(start) < 8 or length > MAX_HEADER or not least <= size - 8 - length <= most:
        raise DamagedPayload("it is cut, or larger than what it should hold")
    return length


def _check_header(metadata: dict[str, str], expected: Header) -> None:
    if metadata.get("a3") != expected.to_json():
        raise DamagedPayload("its header names another chunk, model, codec or format")


def _check_layout(tensors: Tensors, expected: Header) -> None:
    layout = expected.layout
    if tensors.keys() != layout.keys() or not all(
        spec.accepts(tensors[name]) for name, spec in layout.items()
    ):
        raise DamagedPayload("its tensors have other names, shapes or dtypes than its header says")


def _check_seal(payload: Payload, metadata: dict[str, str], secret: bytes | None) -> None:
    digest = payload.digest()
    if metadata.get("sha256") != digest.hex():
        raise DamagedPayload("its checksum does not match its content")
    if secret is not None:
        sealed = str(metadata.get("hmac")).encode("utf-8", "replace")
        if not hmac.compare_digest(sealed, hmac.digest(secret, digest, "sha256").hex().encode()):
            raise DamagedPayload("it was not written by a holder of the store's secret")
