"""Prices of models, and the budget of a run."""

import math

from parts.api.questions import max_token_count
from parts.api.replies import extract_usage
from parts.cli import InputError

PRICES_DATE = "August 2025"
PRICES = {  # dollars per million tokens, in and out; by prefix of the model's name; the longest one counts
    "gpt-4": (30, 60),
    "gpt-4-32k": (60, 120),
    "gpt-4-turbo": (10, 30),
    "gpt-4o": (2.5, 10),
    "gpt-4o-mini": (0.15, 0.6),
    "gpt-4.1": (2, 8),
    "gpt-4.1-mini": (0.4, 1.6),
    "gpt-4.1-nano": (0.1, 0.4),
    "gpt-3.5-turbo": (0.5, 1.5),
    "gpt-5": (1.25, 10),
    "gpt-5-mini": (0.25, 2),
    "gpt-5-nano": (0.05, 0.4),
    "o1": (15, 60),
    "o3": (2, 8),
    "o3-mini": (1.1, 4.4),
    "o4-mini": (1.1, 4.4),
}


def list_prices(model: str) -> tuple[float | None, float | None]:
    """Dollars per million tokens in and out; (None, None) for a model that is not in the table."""
    name = max((name for name in PRICES if model.startswith(name)), key=len, default=None)
    return PRICES[name] if name else (None, None)


class Budget:
    """Dollars spent, and reserved for requests in flight, within a limit.

    `prices`: dollars per million tokens in and out, None if unknown. Raises InputError for a limit without prices.
    """

    def __init__(self, prices: list[float | None], limit: float = math.inf):
        if None in prices and limit < math.inf:
            raise InputError("the price of the model is not known: --budget needs --price-in and --price-out")
        self.prices, self.limit = prices, limit
        self.spent = self.reserved = 0.0
        self.in_flight = self.tokens_in = self.tokens_out = 0

    def dollars(self, tokens_in: int, tokens_out: int) -> float:
        return sum((price or 0) * n / 1e6 for price, n in zip(self.prices, (tokens_in, tokens_out)))

    def max_dollars(self, body: dict) -> float:
        """The maximum cost of a request: no tokenizer makes more tokens than there are bytes."""
        messages = body.get("messages", ())
        sent = max_token_count(messages or body["prompt"]) + 16 * len(messages)
        return self.dollars(sent, body.get("max_tokens") or body["max_completion_tokens"])

    def allows(self, dollars: float) -> bool:
        return self.spent + self.reserved + dollars <= self.limit

    def reserve(self, dollars: float) -> bool:
        """Reserve the maximum cost of a request; False if the limit does not allow it."""
        if not self.allows(dollars):
            return False
        self.reserved += dollars
        self.in_flight += 1
        return True

    def release(self, dollars: float) -> None:
        self.reserved -= dollars
        self.in_flight -= 1

    def settle(self, record: dict) -> None:
        """Count the tokens and the cost of a record: its `dollars`, or its usage at the current price if the price was
        not known then, and the dollars of the incomplete replies before it (`broken`)."""
        tokens, dollars, broken = extract_usage(record), record.get("dollars"), record.get("broken")
        self.tokens_in += tokens[0]
        self.tokens_out += tokens[1]
        self.spent += dollars if isinstance(dollars, float) else self.dollars(*tokens)
        self.spent += broken if isinstance(broken, float) else 0.0

    def describe_exceeded(self) -> str:
        return f"the budget of ${self.limit:g} could be exceeded (${self.spent:.2f} are spent)"
