"""The flags of programs that use an OpenAI-compatible server, and the dataclass with their values."""

import argparse
import math
from dataclasses import dataclass, field, fields

from parts.api.pricing import PRICES_DATE, list_prices
from parts.cli import positive_float, positive_int

REPLY_TIMEOUTS = 5  # timeouts within which a reply must be complete


@dataclass(frozen=True)
class ApiOptions:
    """Settings of requests; add_api_arguments describes the fields. OPENAI_BASE_URL and OPENAI_API_KEY are not here."""

    model: str = "gpt-4-0613"
    concurrency: int = 64
    rpm: float = math.inf
    tpm: float = math.inf
    max_tokens: int = 16
    temperature: float = 0.0
    timeout: float = 120.0
    retries: int = 8
    budget: float = math.inf
    price_in: float | None = None
    price_out: float | None = None
    batch: bool = False
    batch_poll: float = 30.0
    ask_refused: bool = False
    dry_run: bool = False
    extra: dict = field(default_factory=dict)  # further parameters of every request: top_p …

    def prices(self) -> list[float | None]:
        """Dollars per million tokens in and out, halved for batches; None if unknown."""
        given = zip((self.price_in, self.price_out), list_prices(self.model))
        prices = [listed if own is None else own for own, listed in given]
        return [price / 2 if price and self.batch else price for price in prices]


def add_api_arguments(parser: argparse.ArgumentParser, sampling: bool = True) -> None:
    """Add a flag for each field of ApiOptions; without `sampling`, no --api-model, --max-tokens and --temperature."""
    group, default = parser.add_argument_group("API (OPENAI_API_KEY and OPENAI_BASE_URL are honored)"), ApiOptions()

    def add(flag: str, kind: type, metavar: str, text: str) -> None:
        value = default.model if flag == "--api-model" else getattr(default, flag[2:].replace("-", "_"))
        group.add_argument(flag, type=kind, default=value, metavar=metavar, help=text)

    if sampling:
        add("--api-model", str, "M", "name of the model that is asked")
        add("--max-tokens", positive_int, "N", "longest reply, in tokens")
        add("--temperature", float, "X", "sampling temperature")
    add("--concurrency", positive_int, "N", "requests in flight at once")
    add("--rpm", positive_float, "N", "requests per minute, at most")
    add("--tpm", positive_float, "N", "tokens per minute, at most")
    timeout_help = f"seconds without a byte of a reply; {REPLY_TIMEOUTS} times as many for a whole reply"
    add("--timeout", positive_float, "S", timeout_help)
    add("--retries", positive_int, "N", "retries of a request that fails")
    add("--budget", float, "USD", "stop before more is spent")
    add("--price-in", float, "USD", f"per million input tokens (default: a table of {PRICES_DATE})")
    add("--price-out", float, "USD", "per million output tokens")
    add("--batch-poll", positive_float, "S", "seconds between status requests of a batch")
    group.add_argument("--batch", action="store_true", help="use the Batch API: half the price, within 24 hours")
    group.add_argument("--dry-run", action="store_true", help="print rows, tokens and dollars, send nothing")
    refused_help = "ask again what was refused, failed or could not be parsed before"
    group.add_argument("--ask-refused", action="store_true", help=refused_help)


def api_options(args: argparse.Namespace, **own) -> ApiOptions:
    """ApiOptions from the flags of add_api_arguments, and `own` values of the program."""
    values = {f.name: getattr(args, f.name) for f in fields(ApiOptions) if hasattr(args, f.name)}
    return ApiOptions(**values | {"model": getattr(args, "api_model", "")} | own)
