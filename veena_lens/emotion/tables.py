"""The tables of a run, made of what results.json holds: once as Markdown, once as cells of a page.

A `Table` is records and columns. Each column says what a record shows in it; where a page says it in other words or
with other digits than Markdown, the column holds both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]
Results = Mapping[str, Any]
Cell = str | int | float | None

PLAIN = "plain"
LONG_SETTINGS = ("layers", "directions", "vectors", "source")  # too long for a line of Markdown


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: its heading.
        cell: what a record shows in it.
        page_name, page_cell: the same on a page, where they differ.
        only: "markdown" or "page" for a column of one of them alone.
    """

    name: str
    cell: Callable[[Record], Cell]
    page_name: str | None = None
    page_cell: Callable[[Record], Cell] | None = None
    only: str | None = None


@dataclass(frozen=True)
class Table:
    """Records, and the columns that show them."""

    records: Sequence[Record]
    columns: Sequence[Column]

    def markdown(self) -> str:
        """Return the table as Markdown."""
        columns = [c for c in self.columns if c.only != "page"]
        lines = ["| " + " | ".join(c.name for c in columns) + " |", "|---" * len(columns) + "|"]
        return "\n".join([*lines, *("| " + " | ".join(str(c.cell(r)) for c in columns) + " |" for r in self.records)])

    def page(self) -> tuple[list[str], list[list[Cell]]]:
        """Return headings and rows of cells, numbers as numbers, for a page."""
        columns = [c for c in self.columns if c.only != "markdown"]
        names = [c.name if c.page_name is None else c.page_name for c in columns]
        return names, [[(c.page_cell or c.cell)(record) for c in columns] for record in self.records]

    def without(self, *names: str) -> Table:
        """Return the table without the columns of these headings."""
        return Table(self.records, [c for c in self.columns if c.name not in names])


# --- cells ----------------------------------------------------------------------------------------------------


def percent(x: float | None, digits: int = 1) -> str:
    """Return a share in percent, "" for one that is not known."""
    return "" if x is None or x != x else f"{100 * x:.{digits}f}"


def display_name(method: str) -> str:
    """Return a method's name on a page, where "plain" is also a strength of contexts."""
    return "plain model" if method == PLAIN else method


def _text(key: str) -> Callable[[Record], Cell]:
    return lambda r: str(r[key])


def _integer(key: str) -> Callable[[Record], Cell]:
    return lambda r: int(r[key])


def _fixed(key: str, digits: int) -> Callable[[Record], Cell]:
    return lambda r: f"{r[key]:.{digits}f}"


def _share(key: str, digits: int = 1) -> Callable[[Record], Cell]:
    return lambda r: percent(r[key], digits)


def _to(digits: int) -> Callable[[Record], Cell]:
    return lambda r: f"{r['low']:.{digits}f} to {r['high']:.{digits}f}"


def _percent_to(r: Record) -> Cell:
    return f"{percent(r['low'])} to {percent(r['high'])}"


def _percent_brackets(r: Record) -> Cell:
    return f"[{percent(r['low'], 0)}, {percent(r['high'], 0)}]"


def _interval(r: Record) -> Cell:
    return f"{r['effect']:.3f} [{r['low']:.3f}, {r['high']:.3f}]"


def _head(r: Record) -> Cell:
    return f"L{r['layer']}H{r['head']}"


def _method(r: Record) -> Cell:
    return display_name(r["method"])


def _part(key: str) -> Callable[[Record], Cell]:
    """Return a part of the model as people write it: "3_mlp_out" is the MLP of layer 3."""
    return lambda r: f"MLP {r[key].removesuffix('_mlp_out')}" if r[key].endswith("_mlp_out") else r[key]


def _settings(skip: Sequence[str] = ()) -> Callable[[Record], Cell]:
    return lambda r: ", ".join(f"{k} {v}" for k, v in r["settings"].items() if k not in skip)


def _named_settings(r: Record) -> Cell:
    """Return the settings of a method in words, numbers without needless digits."""

    def shown(value: Any) -> str:
        return f"{value:g}" if isinstance(value, float) else str(value)

    names = {"beta": "attention times", "gamma": "neurons times", "k": "neurons", "mode": "attention mode"}
    names |= {"beta_max": "attention times at most", "gamma_max": "neurons times at most", "kind": "rule"}
    settings = {k: v for k, v in r["settings"].items() if k not in ("directions", "vectors", "vector", "source")}
    known = {"beta": "beta_max", "gamma": "gamma_max"}  # said already as the largest
    return "; ".join(f"{names.get(k, k)} {shown(v)}" for k, v in settings.items() if known.get(k) not in settings)


def _rounded(key: str, digits: int, factor: int = 1) -> Callable[[Record], Cell]:
    """Return the cell of a number with so many decimals, "" where it is not known."""
    return lambda r: "" if r.get(key) is None or r[key] != r[key] else f"{factor * r[key]:.{digits}f}"


def _effect(key: str) -> Callable[[Record], Cell]:
    return lambda r: "" if r.get(key) is None else f"{r[key]:.3g}"


# --- tables ----------------------------------------------------------------------------------------------------


def main(results: Results, methods: Sequence[str] | None = None) -> Table:
    """Return the main table: a row per method, a column per condition.

    Cells: the hit rate in percent with its interval, and a star where the difference to the plain model is significant
    (p < 0.05, paired, identities' signs flipped).

    Args:
        results: what results.json holds.
        methods: the rows; by default all.
    """
    rows = results["test"]["table"]
    conditions = list(dict.fromkeys(row["condition"] for row in rows))
    by = {(row["method"], row["condition"]): row for row in rows}

    def hit(condition: str) -> Callable[[Record], Cell]:
        def cell(record: Record) -> Cell:
            row = by[record["method"], condition]
            star = "*" if row.get("p") is not None and row["p"] < 0.05 else ""
            return f"{percent(row['hit'])}{star} [{percent(row['low'], 0)}, {percent(row['high'], 0)}]"

        return cell

    def false(record: Record) -> Cell:
        return percent(by.get((record["method"], "alone"), {}).get("false"))

    wanted = list(dict.fromkeys(row["method"] for row in rows)) if methods is None else methods
    columns = [Column("method", _text("method"), page_cell=_method), *(Column(c, hit(c)) for c in conditions)]
    columns.append(Column("false emotion", false, page_name="false emotion, %"))
    return Table([{"method": method} for method in wanted], columns)


OWN = ("VEE", "ENA", "VEENA", "VEENA adaptive")
STANDING_FOR = {"VEE": "random heads of the same layers", "ENA": "random neurons of the same layers"}


def summary(results: Results, condition: str = "conflict, plain") -> Table:
    """Return the short table of a run: the method beside its controls and its price.

    Rows: the plain model; VEE and ENA, each followed by random heads or neurons at the same strength (the interval is
    that of 95 % of the draws); VEENA; the best baseline with a trial that passed the guards. Columns: the hit rate
    under conflict and for the image alone, and the share of other questions about the same images answered right.

    Args:
        results: what results.json holds.
        condition: the conflict.
    """
    hits = {(r["method"], r["condition"]): r for r in results["test"]["table"]}
    others = {r["method"]: r.get("attributes") for r in results["side_effects"]}
    drawn = {r["method"]: r for r in results["random"]["table"] if r["condition"] == condition}
    fluent = [m for m, tuned in results["tuned"].items() if any(trial["allowed"] for trial in tuned["trials"])]
    baselines = [m for m in fluent if m not in OWN and (m, condition) in hits]
    best = max(baselines, key=lambda m: hits[m, condition]["hit"], default=None)
    records: list[dict[str, Any]] = []
    for method in filter(None, (PLAIN, "VEE", "ENA", "VEENA", best)):
        if (method, condition) not in hits:
            continue
        alone = hits.get((method, "alone"))
        name = display_name(method) if method != best else f"{method}, the best baseline"
        records.append({"name": name, **hits[method, condition], "alone": alone, "other": others.get(method)})
        if method in STANDING_FOR and method in drawn:
            chance = {**drawn[method], "hit": drawn[method]["random"], "alone": None, "other": None}
            records.append({"name": STANDING_FOR[method], **chance})

    def alone_hit(r: Record) -> Cell:
        return "" if r["alone"] is None else percent(r["alone"]["hit"])

    columns = [
        Column("method", _text("name")),
        Column("right under conflict, %", lambda r: f"{percent(r['hit'])} {_percent_brackets(r)}"),
        Column("image alone, %", alone_hit),
        Column("other questions, %", _share("other")),
    ]
    return Table(records, columns)


def random(results: Results) -> Table:
    """Return the table of random heads and neurons beside the chosen ones."""
    columns = [
        Column("method", _text("method")),
        Column("condition", _text("condition")),
        Column("plain", _share("plain"), "plain model, %"),
        Column("chosen", _share("real"), "chosen, %"),
        Column("random", _share("random"), "random, %"),
        Column("95 % of random", _percent_to, page_cell=_percent_brackets),
        Column("percentile", _share("percentile", 0)),
    ]
    return Table(results["random"]["table"], columns)


def head_rankings(results: Results) -> Table:
    """Return the table of rankings and modes on validation."""
    columns = [
        Column("heads ranked by", _text("way"), "ranking"),
        Column("mode", _text("mode")),
        Column("plain", _share("plain"), only="markdown"),
        Column("score", _share("worth"), "score, %"),
        Column("harm", _share("harm"), "harm, %"),
        Column("perplexity", _fixed("perplexity", 2), page_cell=_rounded("perplexity", 2)),
    ]
    return Table(results["ways"]["table"], columns)


def tuned(results: Results) -> Table:
    """Return the table of what was tuned, by family."""

    def allowed(r: Record) -> Cell:
        return f"{sum(bool(t['allowed']) for t in r['trials'])} of {len(r['trials'])}"

    columns = [
        Column("method", _text("method")),
        Column("settings", _settings(LONG_SETTINGS), page_cell=_named_settings),
        Column("score", _share("worth"), "score, %"),
        Column("trials allowed", allowed),
    ]
    return Table([{"method": name, **chosen} for name, chosen in results["tuned"].items()], columns)


def effects(results: Results) -> Table:
    """Return the table of side effects."""
    names = {
        "perplexity": ("perplexity", 2, 1), "distinct_2": ("different word pairs, %", 0, 100),
        "repetition": ("repeated words, %", 0, 100), "drift": ("drift on neutral images, nats", 3, 1),
        "attributes": ("other answers right, %", 1, 100), "described": ("described right, %", 1, 100),
        "latency": ("time ratio", 1, 1),
    }  # fmt: skip
    columns = [
        Column(key.replace("_", "-"), _effect(key), name, _rounded(key, digits, factor))
        for key, (name, digits, factor) in names.items()
    ]
    columns.insert(3, Column("words", _effect("length"), page_cell=_rounded("length", 1), only="page"))
    return Table(results["side_effects"], [Column("method", _text("method"), page_cell=_method), *columns])


def elsewhere(results: Results) -> Table:
    """Return the table of images of other kinds."""
    columns = [
        Column("images", _text("condition")),
        Column("method", _text("method"), page_cell=_method),
        Column("n", _text("n"), page_cell=_integer("n")),
        Column("hit rate", _share("hit"), "hit rate, %"),
        Column("95 %", _percent_to, page_cell=_percent_brackets),
    ]
    return Table(results["elsewhere"] or [], columns)


def layers(results: Results) -> Table:
    """Return the table of C by layer."""
    columns = [
        Column("layer", _text("layer")),
        Column("C", _fixed("C", 2)),
        Column("95 %", _to(2)),
        Column("random direction", _fixed("control", 2)),
        Column("in the band", lambda r: "yes" if r["in_band"] else ""),
    ]
    return Table(results["key_layers"]["by_layer"], columns)


def heads(results: Results) -> Table:
    """Return the table of heads, best first; where no head's emotion is known, without what is said of it."""
    columns = [
        Column("head", _head),
        Column("key", lambda r: "key" if r["key"] else "", "", only="page"),
        Column("restores", _fixed("effect", 3)),
        Column("95 %", _to(3), page_cell=lambda r: f"[{r['low']:.3f}, {r['high']:.3f}]"),
        Column("at", _text("rows")),
        Column("intention", _fixed("intention", 2), page_cell=_rounded("intention", 2)),
        Column("from picture, %", _share("from_picture"), page_cell=_share("from_picture", 0)),
        Column("tau", _rounded("tau", 2), only="page"),
        Column("cross-fitted", _rounded("tau_crossed", 2), only="page"),
        Column("kind", _text("label")),
        Column("most", _text("emotion")),
    ]
    return Table(results["key_heads"]["table"], columns)


def is_confirmed(edge: Record) -> bool:
    """Return True for an edge that is kept and whose interval does not touch 0."""
    return bool(edge["kept"]) and (edge["low"] > 0 or edge["high"] < 0)


def edges(results: Results) -> Table:
    """Return the table of the circuit's edges that are confirmed."""
    columns = [
        Column("level", _integer("level")),
        Column("from", _part("sender")),
        Column("to", _part("receiver")),
        Column("effect", _interval),
        Column("direct path", _rounded("path", 3)),
    ]
    return Table([r for r in results["key_heads"]["edges"] if is_confirmed(r)], columns)


def execution(results: Results) -> Table:
    """Return the table of heads after the key layer."""
    return Table(results["key_heads"]["execution"], [Column("head", _head), Column("restores", _interval)])


def neurons(results: Results) -> Table:
    """Return the table of key neurons."""

    def promotes(r: Record) -> Cell:
        return ", ".join(word.strip() for word in r["promotes"] if any(c.isalnum() for c in word))

    columns = [
        Column("neuron", lambda r: f"L{r['layer']}N{r['neuron']}"),
        Column("kind", _text("kind")),
        Column("pairs", lambda r: str(r["emotion"] or "all")),
        Column("at", _text("rows")),
        Column("push", _rounded("value", 2)),
        Column("consistency", _rounded("consistency", 2)),
        Column("emotion words of 20", _integer("lexicon_tokens")),
        Column("promotes", promotes),
    ]
    return Table(results["key_neurons"], columns)
