"""The page of a report: one HTML file with the tables, the figures and all answers; it needs no network."""

import base64
import json
from pathlib import Path

from parts.cli import strip_control_chars
from parts.files import read_text
from parts.report.figures import FIGURES, MAX_NAMED_MODELS
from parts.report.win_rates import describe_canaries, describe_question_mismatches, judge_name, without_canaries

PAGE_DATA_MARKER = '<script type="application/json" id="data">'  # the element of page.html that render_page fills


def describe_orders(rows: list[dict]) -> str:
    """How many comparisons were judged in both orders: not those of identical answers or by exact match."""
    in_orders = sum(judge_name(r) != "exact" and isinstance(r.get("scores"), list) and any(r["scores"]) for r in rows)
    if in_orders == len(rows):
        return ", each in both orders"
    return f", {in_orders:,} of them in both orders" if in_orders else ""


def page_data(rows: list[dict], summary: list[dict], figures: dict[str, dict[str, bytes]]) -> dict:
    """The data that the page's script shows; `figures` as from report_figures."""
    names = {(r["model"], r["baseline"], r["judge"]): r["name"] for r in summary}
    canaries, rows = describe_canaries(rows), without_canaries(rows)
    texts: dict[str, int] = {}  # each distinct text -> its index

    def index(text: str) -> int:
        return texts.setdefault(text, len(texts))

    pairs = []
    for r in rows:
        pair = {key: r[key] for key in ("baseline", "dataset", "id", "verdict")}
        pair["judge"] = judge_name(r)
        pair["model"] = names[tuple(map(strip_control_chars, (r["model"], r["baseline"], pair["judge"])))]
        for key in ("instruction", "answer", "against"):
            pair[key] = index(str(r.get(key, "")))
        pair["expected"] = index(r["expected"]) if isinstance(r.get("expected"), str) else None
        for key in ("scores", "replies"):  # one per order
            pair[key] = r[key] if isinstance(r.get(key), list) else []
        pairs.append(pair)
    questions = len({(r["dataset"], r["id"]) for r in rows})
    judges = " and ".join(dict.fromkeys(map(judge_name, rows)))
    models, baselines = (list(dict.fromkeys(r[key] for r in rows)) for key in ("model", "baseline"))
    title = ", ".join(models) if len(models) <= MAX_NAMED_MODELS else f"{len(models)} models"
    about = f"{questions:,} questions, {len(rows):,} comparisons{describe_orders(rows)}. Judge: {judges}."
    return {
        "title": f"{title} against {' and '.join(baselines)}",
        "about": "\n".join([*canaries, *describe_question_mismatches(summary), about]),
        "summary": summary,
        "figures": [{"title": FIGURES[k], "svg": base64.b64encode(v["svg"]).decode()} for k, v in figures.items()],
        "rows": pairs,
        "texts": list(texts),
    }


def render_page(content: dict) -> str:
    """parts/report/page.html with `content` as its data, in ASCII without `<`, so that it cannot end the element. The
    page's script shows it as text; the browser runs no other script, since the page's policy has its hash only."""
    before, after = read_text(Path(__file__).with_name("page.html")).split(PAGE_DATA_MARKER)
    return before + PAGE_DATA_MARKER + json.dumps(content).replace("<", "\\u003c") + after[after.index("</script>") :]
