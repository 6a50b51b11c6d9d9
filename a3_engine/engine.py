"""The engine: plan a prompt, load its chunks, fuse them, decode.

text ─► PromptPlanner ─► segments ─► ChunkLibrary ─► FusedCache ─► fusion pass ─► decode ─► text
                           └─ a miss is computed now and stored ─┘        └► FusionReport
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from a3_engine.assembly import assemble, touch
from a3_engine.chunks.codecs import DEFAULT_CODEC, check_codec
from a3_engine.chunks.fingerprint import digest
from a3_engine.chunks.stand_in import AUTO, passages_of
from a3_engine.chunks.store import StoreOptions, StoreStats
from a3_engine.decoding.compression import make_compression
from a3_engine.decoding.compression.base import Compression
from a3_engine.decoding.sampling import Sampling
from a3_engine.errors import ContextOverflowError
from a3_engine.explain import Explanation, explain
from a3_engine.fusion.cache import FusedCache
from a3_engine.fusion.selectors import BALANCED, choose_selector
from a3_engine.fusion.selectors.base import Selector
from a3_engine.ingestion import Precomputed, ingest
from a3_engine.messages import clean
from a3_engine.method import Method
from a3_engine.model.executor import undisturbed
from a3_engine.model.loading import (
    default_cache_dir,
    known_context_window,
    known_to_chat,
    load_model,
    transformers_model,
)
from a3_engine.options import METHOD_OPTIONS, MethodOptions, RequestOptions
from a3_engine.processes import Lock
from a3_engine.prompt import Chunk, Message
from a3_engine.report import FusionReport
from a3_engine.request import Request, check_room
from a3_engine.runtime import Runtime, context_window, renewed, start
from a3_engine.segments import Prompt
from a3_engine.stream import Answer, AsyncTokenStream, Emit, TokenStream, Work
from a3_engine.turns import DAY_S

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]
Loader = Callable[[], Loaded]
PromptLike = str | Sequence[Message] | Prompt


class A3Engine:
    """Answers prompts from cached chunks. Build it with :meth:`from_pretrained`.

    Nothing heavy happens before the first use. One engine may be called from many threads and event
    loops: prefills compute one after the other, and requests decode together.

    Parameters
    ----------
    source : (model, tokenizer) or callable
        What returns them is called once, on first use, and their model is the engine's alone, to be
        laid out for this machine; see :mod:`a3_engine.model.packing`.
    name : str
        The model's name in reports.
    cache_dir : path or None
        Folder for chunks and unpacked models; the user's cache folder by default.
    quality : str or None
        ``"fast"`` recomputes nothing, ``"balanced"`` is the default, ``"exact"`` an ordinary
        prefill; in place of selector and ratio.
    selector : str, Selector or None
        The fusion method; see ``a3_engine.fusion.selectors``.
    ratio : float or None
        Recompute ratio, 0 to 1; the method's own default where None.
    compression : str, Compression or None
        What decoding keeps of the prompt's cache; see ``a3_engine.decoding.compression``.
    keep : float or None
        Share of the prompt's tokens that compression keeps; its own default where None.
    encode_prefix : str
        What chunks are computed after: ``"template"``, ``"bos"``, ``"none"`` or a text; see
        :class:`~a3_engine.prompt.PromptPlanner`.
    stand_in : str or sequence of str
        What they are computed after as well, in place of a prompt's other documents:
        ``"shipped"``, ``"none"`` or passages of your own; ``"auto"`` is what `a3 tune` saved for
        this model, or else ``"shipped"``. See :mod:`a3_engine.chunks.stand_in`.
    size_limit : int or None
        Bytes that the chunk store may take; half of the disk's free space where None.
    codec : str
        How chunks are stored: ``"raw"``, ``"int8"``, ``"int4"``, ``"compact"``,
        ``"compact-small"``; see docs/store.md.
    store : str, StoreOptions or None
        URL of a store shared with other machines, or all that can be around the local folder.
    turns_kept_s : float
        Seconds after its last use that a finished turn of a conversation is kept in the local
        folder; 0 keeps none.
    """

    def __init__(
        self,
        source: Loaded | Loader,
        *,
        name: str,
        cache_dir: str | Path | None = None,
        quality: str | None = None,
        selector: str | Selector | None = None,
        ratio: float | None = None,
        compression: str | Compression | None = None,
        keep: float | None = None,
        encode_prefix: str = "template",
        stand_in: str | Sequence[str] = AUTO,
        size_limit: int | None = None,
        codec: str = DEFAULT_CODEC,
        store: str | StoreOptions | None = None,
        turns_kept_s: float = DAY_S,
    ) -> None:
        self.name = name
        self.cache_dir = _absolute(cache_dir)
        self.selector = choose_selector(selector, ratio, quality)
        self._by_default = selector is None and ratio is None and quality in (None, BALANCED)
        self.compression = make_compression(compression, keep)
        passages_of(stand_in)  # a wrong one fails here
        if not turns_kept_s >= 0:
            raise ValueError(f"turns_kept_s is 0 seconds or more, not {turns_kept_s!r}.")
        self._source = source
        self._settings: dict[str, Any] = {
            "encode_prefix": encode_prefix,
            "stand_in": stand_in,
            "size_limit": size_limit,
            "codec": check_codec(codec),
            "store": store if isinstance(store, StoreOptions) else StoreOptions(store),
            "turns_kept_s": turns_kept_s,
        }
        self._recipe: dict[str, Any] | None = None
        self._runtime: Runtime | None = None
        self._starting = Lock()

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        cache_dir: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> A3Engine:
        """An engine for a model that is loaded on first use, or for a ready one.

        Parameters
        ----------
        model : str, path or PreTrainedModel
            A hub id, a local folder, a GGUF file, ``"smollm2-135m-instruct"``, or a loaded model.
        tokenizer : PreTrainedTokenizerBase or None
            Needed with a loaded model only.
        cache_dir, device, dtype, trust_remote_code
            See :func:`~a3_engine.model.loading.load_model`.
        **options
            Settings of :class:`A3Engine`, such as ``selector``, ``ratio``, ``codec``, ``store``.

        Raises
        ------
        ValueError
            A loaded model came without its tokenizer.
        ModelLoadError
            On first use, if nothing can be loaded.
        """
        model = transformers_model(model)
        if isinstance(model, PreTrainedModel):
            if tokenizer is None:
                raise ValueError("Give the tokenizer together with a loaded model.")
            name = model.config._name_or_path or type(model).__name__
            return cls((model.eval(), tokenizer), name=name, cache_dir=cache_dir, **options)
        folder = _absolute(cache_dir)

        recipe: dict[str, Any] = {
            "model": model,
            "cache_dir": folder,
            "device": device,
            "dtype": dtype,
            "trust_remote_code": trust_remote_code,
        }
        engine = cls(lambda: load_model(**recipe), name=str(model), cache_dir=folder, **options)
        engine._recipe = recipe | options
        return engine

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to another process as a recipe; the model is loaded anew there."""
        if self._recipe is None:
            raise TypeError(
                "An engine around a loaded model cannot be pickled. Build it by the model's name "
                "or path, or stay in one process."
            )
        return _from_recipe, (self._recipe,)

    @property
    def runtime(self) -> Runtime:
        """Model, planner and store; made by the first thread that asks.

        Where the model's weights or adapters changed, its chunks are others from then on.
        """
        with self._starting:
            if self._runtime is None:
                own = callable(self._source)
                model, tokenizer = self._source() if callable(self._source) else self._source
                if not own:
                    # Its owner may call it at the same time: fast tokenizers keep truncation and
                    # the handling of special tokens as state.
                    tokenizer = copy.deepcopy(tokenizer)
                self._runtime = start(
                    self.name, model, tokenizer, own=own, cache_dir=self.cache_dir, **self._settings
                )
            elif self._runtime.watch.changed():
                self._runtime = renewed(self._runtime)
            return self._runtime

    @property
    def context_window(self) -> int:
        """Tokens that the prompt and its answer may have together."""
        return self.runtime.context_window

    @property
    def known_window(self) -> int | None:
        """The context window, where it is known without loading the model."""
        if self._runtime is not None:
            return self.context_window
        if not callable(self._source):
            return context_window(self._source[0])
        if self._recipe is None:
            return None
        return known_context_window(str(self._recipe["model"]), self._recipe["cache_dir"])

    @property
    def outline(self) -> tuple[int, bool]:
        """The context window, and whether there is a chat template.

        Read from the model's files where it is not loaded yet, if they are on this machine.
        """
        if self._runtime is None and self._recipe is not None:
            window = self.known_window
            chats = known_to_chat(str(self._recipe["model"]), self._recipe["cache_dir"])
            if window is not None and chats is not None:
                return window, chats
        return self.context_window, bool(self.runtime.tokenizer.chat_template)

    @property
    def fingerprint(self) -> str:
        """Identity of what the engine computes: model, tokenizer, dtype, prefix and stand-in."""
        return self.runtime.fingerprint

    def identity(self, **options: Any) -> str:
        """A name for all that can change an answer beside the prompt; alike for like settings.

        Parameters
        ----------
        **options
            Those of :meth:`stream`, and whatever else of a request can change what is asked.
        """
        runtime = self.runtime
        method = self._method(runtime, **{name: options.pop(name, None) for name in METHOD_OPTIONS})
        template = runtime.tokenizer.chat_template
        ends = runtime.decoder.settings.eos_token_id
        return digest(self.fingerprint, template, ends, repr(method), sorted(options.items()))

    @property
    def unsupported_reason(self) -> str | None:
        """Why the gate serves this model by ordinary prefill; None for a model that is fused."""
        return self.runtime.gate.reason

    # Ingestion and the store

    def precompute(self, chunks: Iterable[str | Chunk], *, progress: bool = True) -> Precomputed:
        """Compute and store the KV of chunks that are not stored yet.

        Every chunk is durable when its step of the progress bar is done; an interrupted run goes on
        where it stopped.

        Raises
        ------
        ContextOverflowError
            A chunk does not fit into the context window. Nothing was computed.
        StoreError
            A chunk cannot be written. Those before it are stored.
        """
        _refuse_bare_text(chunks)
        runtime, window = self.runtime, self.context_window
        with undisturbed():
            return ingest(runtime, chunks, window, progress)

    def remember(self, chunks: Iterable[Chunk]) -> None:
        """Serve these chunks from the cache wherever their text stands in a prompt.

        Those not stored yet are computed when a prompt first holds them.
        """
        if (library := self.runtime.library) is not None:
            library.know(self.runtime.planner.segments(chunks))
            library.text_index.try_to_write()

    def evict(self, tag: str) -> int:
        """Remove the chunks that have this tag alone; returns how many entries there were.

        A chunk that several documents share has all their tags, and goes with the last of them.
        Behind a stand-in a chunk has two entries: itself, and its first tokens as they open a
        prompt.
        """
        if not isinstance(tag, str):
            raise TypeError(f"A tag is a text, not {type(tag).__name__}.")
        tag = clean(tag)
        self.runtime.prefix_cache.clear()  # they may hold its text
        if (turns := self.runtime.turns) is not None:
            turns.drop(tag)
        library = self.runtime.library
        return library.evict(tag) if library else 0

    def stats(self) -> StoreStats:
        """What the store holds."""
        return self.runtime.store.stats()

    def verify(self) -> list[str]:
        """Check every stored chunk, remove the damaged ones, and say what was wrong with them."""
        return self.runtime.store.verify()

    def refresh(self) -> None:
        """Read the model's weights anew, after a change that the engine cannot notice.

        It notices weights changed in place or exchanged, and adapters switched, scaled or merged;
        not adapters that are added, nor what is written through ``weight.data``.
        """
        with self._starting:
            if self._runtime is not None:
                self._runtime = renewed(self._runtime)

    def close(self) -> None:
        """Release the store's files. The engine can be used again; it then opens anew."""
        with self._starting:
            if self._runtime is not None:
                self._runtime.close()
                self._runtime = None

    # Answers

    def plan(
        self,
        request: PromptLike,
        chunks: Sequence[str | Chunk] = (),
        conversation: str | None = None,
    ) -> Prompt:
        """The segments of a request.

        Parameters
        ----------
        request : str, sequence of Message, or Prompt
            A question, a conversation, or a prompt planned before.
        chunks : sequence of str or Chunk
            Documents to stand before a question given as text.
        conversation : str or None
            A name for the conversation that the request belongs to. Its finished turns are found
            under this name alone; without one, by prompts that say the same up to there.

        Raises
        ------
        ValueError
            The request is empty, or chunks came with something that is not a question.
        """
        _refuse_bare_text(chunks)
        if isinstance(request, Prompt):
            if chunks:
                raise ValueError("The prompt is planned already: give its chunks to plan().")
            if conversation is not None:
                raise ValueError("The prompt is planned already: name its conversation to plan().")
            return request
        if isinstance(request, str):
            if not request.strip():
                raise ValueError("The question is empty.")
            content: list[str | Chunk] = []
            for chunk in chunks:
                content += [Chunk.read(chunk), "\n\n"]
            return self._plan([Message("user", [*content, request])], conversation)
        if chunks:
            raise ValueError("Put the chunks into the messages' content, or give a plain question.")
        if isinstance(request, Message | Mapping):
            request = [Message.read(request)]
        if not isinstance(request, Iterable):
            raise TypeError(
                "A request is a question, a list of messages or a planned prompt, not "
                f"{type(request).__name__}."
            )
        return self._plan([Message.read(message) for message in request], conversation)

    def _plan(self, messages: list[Message], conversation: str | None) -> Prompt:
        """The segments of messages, unless their letters alone say that they do not fit."""
        planner, letters = self.runtime.planner, sum(len(message.text) for message in messages)
        if letters > self.context_window and letters > self.context_window * planner.longest_token:
            raise ContextOverflowError(
                f"The prompt has {letters} characters, more than {self.context_window} tokens can "
                "hold, which is the model's context window. Retrieve fewer or shorter chunks, or "
                "use a model with a longer context. Nothing was cut."
            )
        return planner.plan(messages, conversation=conversation)

    def stream(self, request: PromptLike, **options: Unpack[RequestOptions]) -> TokenStream:
        """Answer piece by piece; closing the stream stops the computation.

        Parameters
        ----------
        request
            See :meth:`plan`.
        **options
            See :class:`~a3_engine.options.RequestOptions`.

        Raises
        ------
        ContextOverflowError
            Prompt and answer do not fit into the context window.
        ValueError
            The request is empty or a setting is out of range.
        """
        return TokenStream(self._work(request, **options))

    def generate(self, request: PromptLike, **options: Unpack[RequestOptions]) -> Answer:
        """The whole answer; the options are those of :meth:`stream`."""
        pieces: list[str] = []
        report = self._work(request, **options)(pieces.append, lambda: False)
        return Answer("".join(pieces), report)

    async def astream(
        self, request: PromptLike, **options: Unpack[RequestOptions]
    ) -> AsyncTokenStream:
        """:meth:`stream` for an event loop."""
        return AsyncTokenStream(lambda emit, gone: self._work(request, **options)(emit, gone))

    async def agenerate(self, request: PromptLike, **options: Unpack[RequestOptions]) -> Answer:
        """:meth:`generate` for an event loop; cancelling it stops the computation."""
        stream = await self.astream(request, **options)
        pieces = [piece async for piece in stream]
        assert stream.report is not None
        return Answer("".join(pieces), stream.report)

    def prepare(
        self,
        request: PromptLike,
        *,
        chunks: Sequence[str | Chunk] = (),
        room: int = 0,
        **method: Unpack[MethodOptions],
    ) -> tuple[Prompt, FusedCache]:
        """Load a prompt's chunks into a cache, for one's own forward pass.

        ``model(input_ids=all prompt ids, cache=cache)`` then runs the fusion pass; before
        transformers 5.24 the argument is ``past_key_values``.

        Parameters
        ----------
        room : int
            Slots for tokens after the prompt; the cache grows beyond them where needed.
        **method
            ``quality``, ``selector``, ``ratio``, ``compression``, ``keep``. A compression is
            applied by ``cache.compressor.compress(model, cache, first token)`` after the forward
            pass.

        Raises
        ------
        UnsupportedModelError
            Chunks of this model cannot be moved.
        """
        runtime = self.runtime
        prompt, chosen = self.plan(request, chunks), self._method(runtime, **method)
        cache = assemble(runtime, prompt, chosen, room, FusionReport()).cache
        touch(runtime, prompt, chosen.selector)
        return prompt, cache

    def fuse(self, request: PromptLike, **options: Any) -> tuple[Prompt, FusedCache]:
        """The former name of :meth:`prepare`."""
        warnings.warn("A3Engine.fuse is now prepare.", DeprecationWarning, stacklevel=2)
        return self.prepare(request, **options)

    def explain(self, response: object) -> Explanation:
        """Show which tokens were computed; see :func:`a3_engine.explain.explain`."""
        return explain(response, self.runtime.tokenizer, list(self.runtime.reports))

    @property
    def last_report(self) -> FusionReport | None:
        """The report of the request that finished last, in whatever thread; None before any.

        With several threads take the one that came with your own answer.
        """
        reports = self.runtime.reports if self._runtime is not None else None
        return reports[-1] if reports else None

    # How

    def _method(
        self,
        runtime: Runtime,
        quality: str | None = None,
        selector: str | Selector | None = None,
        ratio: float | None = None,
        compression: str | Compression | None = None,
        keep: float | None = None,
    ) -> Method:
        default, profile = self.selector, runtime.profile
        asked_for = quality == BALANCED and selector is None and ratio is None
        if profile is not None and (asked_for or (self._by_default and quality is None)):
            default, quality = profile.selector, None
        return Method(
            choose_selector(selector, ratio, quality, default),
            make_compression(self.compression if compression is None else compression, keep),
        )

    def _work(
        self,
        request: PromptLike,
        *,
        chunks: Sequence[str | Chunk] = (),
        conversation: str | None = None,
        **options: Any,
    ) -> Work:
        """Check everything that can be wrong with a request now, and answer it later."""
        runtime = self.runtime  # loading the model is not part of the request
        started = time.perf_counter()
        method = self._method(runtime, **{name: options.pop(name, None) for name in METHOD_OPTIONS})
        if unknown := set(options) - set(Sampling.__dataclass_fields__):
            raise TypeError(
                f"There is no setting {', '.join(sorted(unknown))}; "
                f"a request takes {', '.join((*METHOD_OPTIONS, *Sampling.__dataclass_fields__))}."
            )
        settings = Sampling(**options)
        prompt = self.plan(request, chunks, conversation)
        plan_s = time.perf_counter() - started
        if settings.temperature > 0 and settings.seed is None:
            settings = replace(settings, seed=runtime.seeds.next(prompt.ids))
        check_room(prompt.n_tokens, settings.max_new_tokens, self.context_window)
        checked = Request(runtime, prompt, method, settings, started, plan_s)

        def work(emit: Emit, abandoned: Callable[[], bool]) -> FusionReport:
            with undisturbed():
                return checked.answer(emit, abandoned)

        return work


def _absolute(cache_dir: str | Path | None) -> Path:
    """One folder for the engine's life, wherever the program goes."""
    return Path(cache_dir).expanduser().absolute() if cache_dir else default_cache_dir()


def _refuse_bare_text(chunks: Iterable[str | Chunk]) -> None:
    if isinstance(chunks, (str, Chunk)):
        raise TypeError("Give a list of chunks, not a single one: [text] instead of text.")
    if not isinstance(chunks, Iterable):
        raise TypeError(f"Give a list of chunks, not {type(chunks).__name__}.")


def _from_recipe(recipe: dict[str, Any]) -> A3Engine:
    return A3Engine.from_pretrained(**recipe)
