"""The numbers of an edit in words, as a table, and for other programs."""

from __future__ import annotations

import json
import math

from torch import Tensor

from .measuring import MEASURES, Numbers

MOST_COLUMNS = 8  # pictures that have a column of their own


def shown(value: float, digits: int) -> str:
    """A number as people read it."""
    return "inf" if math.isinf(value) else "-" if math.isnan(value) else f"{value:.{digits}f}"


def mean(values: Tensor) -> float:
    """The mean over pictures, leaving out those without a value (a mask that leaves nothing outside)."""
    return float(values.double().nanmean())


def sentence(numbers: Numbers, note: str) -> str:
    """The means in one line, and what is to be said about them."""
    parts = [
        f"{MEASURES[name].label} {shown(mean(numbers[name]), MEASURES[name].digits)} {MEASURES[name].unit}".strip()
        for name in MEASURES
        if name in numbers and not math.isnan(mean(numbers[name]))
    ]
    return "\n".join(filter(None, [", ".join(parts), note]))


def markdown(numbers: Numbers, pictures: int, note: str) -> str:
    """The numbers as a table: their mean, and one column per picture up to eight."""
    columns = range(pictures) if 1 < pictures <= MOST_COLUMNS else ()
    head = ["", "mean" if pictures > 1 else "value", *(f"{i + 1}" for i in columns), "what it says"]
    lines = [head, ["---"] * len(head)]
    for name, values in numbers.items():
        kind = MEASURES[name]
        each = [shown(float(v), kind.digits) for v in values] if values.ndim else ["" for _ in columns]
        label = f"{kind.label} ({kind.unit})" if kind.unit else kind.label
        lines.append([label, shown(mean(values), kind.digits), *(each[i] for i in columns), kind.says])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{table}\n\n{note}" if note else table


def as_json(numbers: Numbers) -> str:
    """Means and values of every picture; what is infinite or not measured is a string or missing, as JSON wants."""

    def plain(value: float) -> float | str | None:
        return None if math.isnan(value) else value if math.isfinite(value) else "inf"

    means = {name: plain(mean(numbers[name])) for name in MEASURES if name in numbers}
    each = {name: [plain(float(v)) for v in values] for name, values in numbers.items() if values.ndim}
    return json.dumps({"mean": {k: v for k, v in means.items() if v is not None}, "each": each})
