"""Generation: continuous batching over a key/value cache.

Prompts are prefilled as one packed sequence of documents, as in training. Then each step adds one token to every active
slot; a slot whose answer ends takes the next prompt. The models are `Transformer`s of model.py.
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
    """Sampling options. The random numbers of a prompt depend on the seed and its own tokens only."""

    max_new_tokens: int = 512
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    seed: int = 0
    batch_size: int | None = None  # slots; None: as many as free memory allows
    compile: bool = False  # torch.compile the step, with few shapes: always all slots, and a cache length that doubles


def sample(logits: Tensor, options: Options, chance: Tensor) -> Tensor:
    """Sample a token from each row of `logits` (n, V) with the uniform random numbers `chance` (n,) in [0, 1).

    As in transformers: temperature, then the `top_k` most likely tokens, then of these the fewest with a total
    probability of `top_p`.
    """
    if options.temperature == 0:
        return logits.argmax(1)
    scaled, order = (logits / options.temperature).sort(dim=1, descending=True)
    if options.top_k:
        scaled = scaled[:, : options.top_k]
    p = scaled.double().softmax(1)
    p = p * (p.cumsum(1) - p < options.top_p)
    cumulative = p.cumsum(1)
    index = torch.searchsorted(cumulative, (chance.to(p.device) * cumulative[:, -1])[:, None], right=True).squeeze(1)
    last = (p > 0).sum(1) - 1
    return order.gather(1, torch.minimum(index, last)[:, None]).squeeze(1)


def activation_dtype(model: nn.Module) -> torch.dtype:
    return model.compute_dtype or model.embed.weight.dtype


# ---------------------------------------------------------------- logits of the next token


def prefill(model: nn.Module, cache: KVCache, prompts: list[list[int]], slots: list[int]) -> Tensor:
    """Run prompts through the model as one packed sequence: fp32 logits (D, V) after the last token of each."""
    device = cache.k.device
    capacity, lengths = cache.capacity, torch.tensor([len(p) for p in prompts])
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)
    tokens = torch.tensor([t for p in prompts for t in p], device=device)
    positions = torch.cat([torch.arange(n) for n in lengths])
    of_document = lengths.repeat_interleave(lengths)
    owners = torch.tensor(slots).repeat_interleave(lengths)
    cached = (positions >= of_document - capacity).nonzero().squeeze(1)  # the last ones if not all fit
    cache_rows = owners[cached] * capacity + positions[cached] % capacity
    sizes = {"longest": int(lengths.max()), "sliding_window": model.config.sliding_window}
    within = partial(varlen_attention, cu_seqlens=cu_seqlens, **sizes)
    cached, cache_rows = cached.to(device), cache_rows.to(device)
    attentions = [partial(prefill_attention, within, rows, cached, cache_rows) for rows in zip(*cache.rows())]
    last = cu_seqlens[1:].long() - 1
    return model.logits_at(tokens, positions.to(device), of_document.to(device), attentions, last)


def decode_step(
    model: nn.Module, cache: KVCache, tokens: Tensor, lengths: Tensor, kv_len: int, masked: bool, logits: Callable
) -> Tensor:
    """One more token for each of the first n slots: tokens (n,) at positions `lengths` (n,) -> fp32 logits (n, V).

    Reads the first `kv_len` positions of the cache, which is enough for every slot; `masked`: whether some slot has not
    filled all of them, so that a mask is needed. (Tokens outside a sliding window are no longer in the cache.)
    `logits` is `token_logits`, or its traced version.
    """
    n, device, mask = len(tokens), tokens.device, ()
    if masked:
        mask = ((torch.arange(kv_len, device=device) <= lengths[:, None])[:, None, None],)  # (n, 1, 1, kv_len)
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
    """fp32 logits (n, V) of one token in each of n slots, given views of all layers' cache: writes to `rows` at
    `places` (n,), attends to `read` where `mask` (n, 1, 1, kv_len) is true."""
    layers = zip(zip(*(x.unbind() for x in rows)), zip(*(x.unbind() for x in read)))
    attentions = [partial(decode_attention, *layer, places, mask) for layer in layers]
    return model.logits_at(tokens, lengths, lengths + 1, attentions, slice(None))


class RecordedLogits:
    """`token_logits` of one frozen model on a CPU, traced once by torch.jit.trace and run without Python: the same
    operators give the same bits, and a step of a small model takes half the time.

    A trace is valid for any number of slots and any length. Tracing takes as long as a few dozen steps, so it is not
    used for short answers. A model whose Python code reads tensor values cannot be traced, and runs untraced.
    """

    FROM_STEP = 32

    def __init__(self):
        self.steps = 0
        self.recordings: dict[int, Callable] = {}  # keyed by the number of inputs: without and with a mask

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
            warnings.simplefilter("always")  # also torch.jit's deprecation; torch.compile would take a minute
            recording = torch.jit.trace(step, inputs, check_trace=False)
        reads_values = any(issubclass(w.category, torch.jit.TracerWarning) for w in caught)
        return step if reads_values else recording


def compiled_step(cache: KVCache):
    """`decode_step` compiled; on CUDA as a CUDA graph, which may only write to tensors with static addresses: they are
    marked as such, or torch would skip the graph with only a log message."""
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
    token: int = -1  # the latest token, not in the cache yet
    new_tokens: int = 0


def compact_slots(slots: list[Slot | None], cache: KVCache) -> None:
    """Move the last sequences into free slots, and drop the free slots at the end."""
    for i in range(len(slots)):
        while slots and slots[-1] is None:
            slots.pop()
        if i < len(slots) and slots[i] is None:
            cache.move(len(slots) - 1, i, slots[-1].length)
            slots[i] = slots.pop()


class Engine:
    """Generates the answers to one group of prompts in the slots of one cache: `admit` puts prompts into free slots,
    `step` generates one more token for every active slot. Both return events, in the form that `decode` yields."""

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
        self.waiting = group.members[::-1]  # a stack: the last prompt is next
        self.advance = compiled_step(self.cache) if options.compile else decode_step

    def admit(self) -> list[tuple[int, int | None, str]]:
        """Prefill waiting prompts into free slots, up to `prefill_tokens` tokens or one longer prompt, and sample the
        first token of each."""
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
        """Generate one token for every slot, after dropping free slots, for which no prompt is waiting."""
        compact_slots(self.slots, self.cache)
        n, state = len(self.slots), [(s.token, s.length) for s in self.slots]
        kv_len = max(length for _, length in state) + 1
        if self.options.compile:  # few shapes
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
        """Sample a token for the slots at `places` from their logits; a slot whose answer ends becomes free."""
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

PREFILL_TOKENS = 512  # per prefill, unless one prompt is longer


def plan_slots(
    model: nn.Module, prompts: list[list[int]], limits: list[int], options: Options, free: int | None = None
) -> list[Group]:
    """Group the prompts, longest first, and size a cache for each group; `free`: bytes of memory (default: measured).
    With `batch_size`, or when compiling, all prompts share one cache. Raises WorkError if not one answer fits."""
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
                f"{free / 2**30:,.2f} GiB of memory are free, not enough for an answer of {capacity:,} tokens with its "
                "prompt. Try a smaller --max-new-tokens, shorter prompts, --dtype bf16 (--batch-size 1 tries it anyway)"
            )
        return min(fitting, MAX_SLOTS)

    return plan_groups(needs, slots_of, config.sliding_window, divided=not options.compile)


@torch.no_grad()  # not inference_mode, which a sharded model that is trained afterwards does not support
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

    An answer does not depend on the other prompts in the batch. `limits`: maximum new tokens of each prompt, instead of
    one number for all. A prompt must be shorter than the context; an answer ends at the context's end at the latest.
    `groups`: from `plan_slots`, for ranks that must use the same groups.
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
