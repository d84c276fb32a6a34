"""Generation: continuous batching over a key/value cache.

Prompts are prefilled as one flat run of documents, the path of training. Then every active slot gets one token a step;
a slot whose answer ends takes the next prompt at once. The models here are `Transformer`s of model.py.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parts.cli import WorkError
from parts.kernels import varlen_attention
from parts.kv_cache import (
    MAX_SLOTS,
    MEMORY_FRACTION,
    Group,
    KVCache,
    decode_attention,
    plan_groups,
    prefill_attention,
    slot_bytes,
    working_bytes,
)
from parts.memory import free_memory


@dataclass(frozen=True)
class Options:
    """How answers are made. A prompt's chances come from the seed and its own tokens."""

    max_new_tokens: int = 512
    temperature: float = 0.0  # 0: always the likeliest token
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    seed: int = 0
    batch_size: int | None = None  # slots; None: as many as free memory allows. Changes speed and memory only
    compile: bool = False  # torch.compile on the step, with shapes that change seldom: all slots, a reach that doubles


def sample(logits: Tensor, options: Options, chance: Tensor) -> Tensor:
    """A token from each row of `logits` (n, V); `chance` (n,) in [0, 1) says which.

    As in transformers: temperature, then the `top_k` likeliest, then the fewest that hold `top_p` of the rest.
    """
    if options.temperature == 0:
        return logits.argmax(1)
    scaled, order = (logits / options.temperature).sort(dim=1, descending=True)
    if options.top_k:
        scaled = scaled[:, : options.top_k]
    p = scaled.double().softmax(1)
    p = p * (p.cumsum(1) - p < options.top_p)
    reached = p.cumsum(1)
    at = torch.searchsorted(reached, (chance.to(p.device) * reached[:, -1])[:, None], right=True).squeeze(1)
    last = (p > 0).sum(1) - 1
    return order.gather(1, torch.minimum(at, last)[:, None]).squeeze(1)


def activation_dtype(model: nn.Module) -> torch.dtype:
    return model.compute_dtype or model.embed.weight.dtype


# ---------------------------------------------------------------- logits of the next token


def prefill(model: nn.Module, cache: KVCache, prompts: list[list[int]], slots: list[int]) -> Tensor:
    """Run prompts through the model as documents of one flat run: fp32 logits (D, V) after the last token of each."""
    device = cache.k.device
    capacity, lengths = cache.capacity, torch.tensor([len(p) for p in prompts])
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)
    tokens = torch.tensor([t for p in prompts for t in p], device=device)
    positions = torch.cat([torch.arange(n) for n in lengths])
    of_document = lengths.repeat_interleave(lengths)
    owners = torch.tensor(slots).repeat_interleave(lengths)
    kept = (positions >= of_document - capacity).nonzero().squeeze(1)  # in a window's cache: the last that fit
    places = owners[kept] * capacity + positions[kept] % capacity
    sizes = {"longest": int(lengths.max()), "sliding_window": model.config.sliding_window}
    within = partial(varlen_attention, cu_seqlens=cu_seqlens, **sizes)
    kept, places = kept.to(device), places.to(device)
    attentions = [partial(prefill_attention, within, rows, kept, places) for rows in zip(*cache.rows())]
    last = cu_seqlens[1:].long() - 1
    return model.logits_at(tokens, positions.to(device), of_document.to(device), attentions, last)


def decode_step(
    model: nn.Module, cache: KVCache, tokens: Tensor, lengths: Tensor, kv_len: int, masked: bool, logits: Callable
) -> Tensor:
    """One more token for each of the first n slots: tokens (n,) at positions `lengths` (n,) -> fp32 logits (n, V).

    The first `kv_len` places of the cache are read, which covers all; `masked` says whether some of them are to be
    hidden from some slot: those that it has not filled. (What a window hides, the cache no longer has.) `logits` is
    `token_logits`, or its recording.
    """
    n, device, mask = len(tokens), tokens.device, ()
    if masked:
        mask = ((torch.arange(kv_len, device=device) <= lengths[:, None])[:, None, None],)  # (n, 1, 1, reach)
    places = torch.arange(n, device=device) * cache.capacity + lengths % cache.capacity
    return logits(model, tokens, lengths, places, cache.rows(), cache.read(n, kv_len), *mask)


def token_logits(
    model: nn.Module,
    tokens: Tensor,
    lengths: Tensor,
    places: Tensor,
    rows: tuple[Tensor, Tensor],
    read: tuple[Tensor, Tensor],
    mask: Tensor | None = None,
) -> Tensor:
    """fp32 logits (n, V) of a token in each of n slots: `decode_step` with the views of the cache that it needs, of all
    layers: `rows` to write to, at `places` (n,), and what is `read`, where `mask` (n, 1, 1, reach) is true."""
    layers = zip(zip(*(x.unbind() for x in rows)), zip(*(x.unbind() for x in read)))
    attentions = [partial(decode_attention, *layer, places, mask) for layer in layers]
    return model.logits_at(tokens, lengths, lengths + 1, attentions, slice(None))


class RecordedLogits:
    """`token_logits` of one frozen model on a CPU, recorded once by torch.jit.trace and run without Python: the same
    operators give the same bits, and a step of a small model takes half the time.

    A recording holds for any number of slots and any length. It takes as long as a few dozen steps, so that short
    answers go without. A model whose Python code asks for the values of tensors cannot be recorded, and runs as it is.
    """

    FROM_STEP = 32

    def __init__(self):
        self.steps = 0
        self.recordings: dict[int, Callable] = {}  # by the number of inputs: without and with a mask

    def __call__(self, model: nn.Module, *inputs) -> Tensor:
        self.steps += 1
        if self.steps <= self.FROM_STEP:
            return token_logits(model, *inputs)
        if len(inputs) not in self.recordings:
            self.recordings[len(inputs)] = self.record(model, inputs)
        return self.recordings[len(inputs)](*inputs)

    def record(self, model: nn.Module, inputs: tuple) -> Callable:
        def step(*inputs):
            return token_logits(model, *inputs)

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter(
                "always"
            )  # also torch.jit's deprecation in favour of torch.compile, which takes a minute
            recording = torch.jit.trace(step, inputs, check_trace=False)
        asked = any(issubclass(w.category, torch.jit.TracerWarning) for w in caught)
        return step if asked else recording


def compiled_step(cache: KVCache):
    """`decode_step` compiled; on CUDA as a CUDA graph, which must not write into tensors that could move: without the
    marks, torch would leave it out, and only say so in a log."""
    for x in (cache.k, cache.v):
        torch._dynamo.mark_static_address(x)
    return torch.compile(decode_step, dynamic=False, mode="reduce-overhead" if cache.k.device.type == "cuda" else None)


# ---------------------------------------------------------------- slots


@dataclass
class Slot:
    """One answer in progress."""

    prompt: int  # its index
    length: int  # tokens in the cache
    rng: np.random.Generator
    token: int = -1  # the newest, not in the cache yet
    new_tokens: int = 0


def compact_slots(slots: list[Slot | None], cache: KVCache) -> None:
    """Move the last sequences into the slots that are free, and drop those that are free then."""
    for i in range(len(slots)):
        while slots and slots[-1] is None:
            slots.pop()
        if i < len(slots) and slots[i] is None:
            cache.move(len(slots) - 1, i, slots[-1].length)
            slots[i] = slots.pop()


class Engine:
    """The answers to one group of prompts, in slots of one cache: `admit` puts prompts into free slots, `step` makes
    one more token for every active slot. Both return what happened, as `decode` yields it."""

    def __init__(
        self,
        model: nn.Module,
        prompts: list[list[int]],
        stop: set[int],
        limits: list[int],
        group: Group,
        options: Options,
        prefill_tokens: int,
        logits_of: Callable,
    ):
        self.model, self.prompts, self.stop, self.limits, self.options = model, prompts, stop, limits, options
        self.device, self.prefill_tokens, self.logits_of = model.embed.weight.device, prefill_tokens, logits_of
        self.cache = KVCache(model.config, group.slots, group.capacity, activation_dtype(model), self.device)
        self.slots: list[Slot | None] = [None] * group.slots
        self.waiting = group.members[::-1]  # the last is next
        self.advance = compiled_step(self.cache) if options.compile else decode_step

    def admit(self) -> list[tuple[int, int | None, str]]:
        """Prefill waiting prompts into free slots, up to `prefill_tokens` of them or one prompt that has more, and draw
        the first token of each."""
        admitted, tokens = [], 0
        for i, slot in enumerate(self.slots):
            if slot is not None:
                continue
            if not self.waiting or (admitted and tokens + len(self.prompts[self.waiting[-1]]) > self.prefill_tokens):
                break
            prompt = self.waiting.pop()
            ids = self.prompts[prompt]
            digest = hashlib.sha256(np.array(ids, np.int64).tobytes()).digest()
            self.slots[i] = Slot(prompt, len(ids), np.random.default_rng([self.options.seed, *digest[:8]]))
            admitted.append(i)
            tokens += len(ids)
        chosen = [self.prompts[self.slots[i].prompt] for i in admitted]
        return self.append(admitted, prefill(self.model, self.cache, chosen, admitted))

    def step(self) -> list[tuple[int, int | None, str]]:
        """One token for every slot; those that are free are dropped before, as no prompt waits for them."""
        compact_slots(self.slots, self.cache)
        n, state = len(self.slots), [(s.token, s.length) for s in self.slots]
        kv_len = max(length for _, length in state) + 1
        if self.options.compile:  # shapes that change seldom
            state += [(0, 0)] * (self.cache.slots - n)
            kv_len = max(128, 1 << (kv_len - 1).bit_length())
        kv_len = min(kv_len, self.cache.capacity)
        masked = self.options.compile or any(length + 1 < kv_len for _, length in state)
        newest, lengths = (torch.tensor(x, device=self.device) for x in zip(*state))
        # For a single row torch's own product of a matrix with a vector is twice as fast on a CPU as oneDNN's.
        torch.backends.mkldnn.set_flags(_enabled=len(state) > 1)
        try:
            logits = self.advance(self.model, self.cache, newest, lengths, kv_len, masked, self.logits_of)[:n]
        finally:
            torch.backends.mkldnn.set_flags(_enabled=True)
        for slot in self.slots:
            slot.length += 1
        return self.append(list(range(n)), logits)

    def append(self, places: list[int], logits: Tensor) -> list[tuple[int, int | None, str]]:
        """Draw a token for the slots at `places` from their logits; a slot whose answer ends becomes free."""
        chances = [self.slots[i].rng.random() if self.options.temperature else 0.0 for i in places]
        tokens = sample(logits, self.options, torch.tensor(chances, dtype=torch.float64)).tolist()
        events = []
        for i, token in zip(places, tokens):
            slot = self.slots[i]
            slot.token, slot.new_tokens = token, slot.new_tokens + 1
            ended = "stop" if token in self.stop else ""
            if not ended:
                events.append((slot.prompt, token, ""))
                full = slot.length + 1 >= self.model.config.max_positions
                ended = "length" if full or slot.new_tokens == self.limits[slot.prompt] else ""
            if ended:
                self.slots[i] = None
                events.append((slot.prompt, None, ended))
        return events


# ---------------------------------------------------------------- all prompts

PREFILL_TOKENS = 512  # at once, unless one prompt has more


def plan_slots(
    model: nn.Module, prompts: list[list[int]], limits: list[int], options: Options, free: int | None = None
) -> list[Group]:
    """Which prompts are answered together, the longest first, and with which cache; `free`: bytes (default: those that
    are). With `batch_size`, or compiled for one shape, all share one. Raises WorkError where not one answer fits."""
    if not prompts:
        return []
    config, dtype, longest = model.config, activation_dtype(model), max(map(len, prompts))
    needs = [min(config.max_positions, len(p) + n) for p, n in zip(prompts, limits)]
    if options.batch_size:
        return plan_groups(needs, lambda _: options.batch_size, config.sliding_window, divided=False)
    work = working_bytes(model, max(PREFILL_TOKENS, longest), longest, dtype)
    free = free_memory(model.embed.weight.device) if free is None else free

    def slots_of(capacity: int) -> int:
        fitting = int((MEMORY_FRACTION * free - work) // slot_bytes(config, capacity, dtype, options.temperature > 0))
        if fitting < 1:
            raise WorkError(
                f"{free / 2**30:,.2f} GiB of memory are free: too little for an answer of {capacity:,} tokens with its "
                "prompt. Try a smaller --max-new-tokens, shorter prompts, --dtype bf16 (--batch-size 1 tries it anyway)"
            )
        return min(fitting, MAX_SLOTS)

    return plan_groups(needs, slots_of, config.sliding_window, divided=not options.compile)


@torch.no_grad()  # and not inference_mode: a model that is sharded, and trained on, would not bear it
def decode(
    model: nn.Module,
    prompts: list[list[int]],
    stop: set[int],
    options: Options,
    limits: list[int] | None = None,
    prefill_tokens: int = PREFILL_TOKENS,
    groups: list[Group] | None = None,
) -> Iterator[tuple[int, int | None, str]]:
    """Yields (prompt, token, "") for every new token and (prompt, None, "stop" | "length") when its answer ends.

    An answer does not depend on what else is in the batch. `limits`: most new tokens of each prompt, instead of one
    number for all. A prompt must be shorter than the context, where an answer ends at the latest. `groups`: of
    `plan_slots`, for ranks that have to agree on them.
    """
    limits = limits or [options.max_new_tokens] * len(prompts)
    groups = plan_slots(model, prompts, limits, options) if groups is None else groups
    frozen = not any(p.requires_grad for p in model.parameters())
    recorded = frozen and model.embed.weight.device.type == "cpu" and not options.compile
    if recorded and model.recording is None:
        model.recording = RecordedLogits()
    logits_of = model.recording if recorded else token_logits
    for group in groups:
        engine = Engine(model, prompts, stop, limits, group, options, prefill_tokens, logits_of)
        while engine.waiting or any(engine.slots):
            yield from engine.admit() if engine.waiting and None in engine.slots else engine.step()
