"""Curves: what was logged, by step, and its geometry as a chart.

It owns scales, ticks, thinning and smoothing; it must not read files or write any markup.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from posttrain.contract.facts import Fact, Logged, Started

Points = tuple[tuple[int, float], ...]
"""(step, value), by rising step; every value is finite."""

MAX_DRAWN_POINTS = 600
"""Points of a line beyond this are thinned: a screen has no more columns."""
SMOOTHED_FROM = 150
"""Noisy lines of fewer points are drawn as they are."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One named line of a chart; `colour` is the number of a colour of the page's palette."""

    name: str
    points: Points
    colour: int = 1
    dashed: bool = False
    noisy: bool = True
    """A line of many points is smoothed, and what was logged stands faint behind it."""


@dataclass(frozen=True, kw_only=True)
class Redone:
    """Steps that were trained twice because a gang restarted: after `start`, up to and with `end`."""

    start: int
    end: int
    label: str


@dataclass(frozen=True, kw_only=True)
class Tick:
    """A labelled position on an axis, in the units of the drawing."""

    at: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A line in the units of the drawing."""

    name: str
    colour: int
    dashed: bool
    path: str
    """The line as an SVG path."""
    faint_path: str
    """What was logged, behind a smoothed line; empty where nothing was smoothed."""
    dots: tuple[tuple[float, float, str], ...]
    """x, y and label of each point, where they are few enough to be seen apart."""
    points: Points
    """Thinned points, for the read-out."""


@dataclass(frozen=True, kw_only=True)
class Band:
    """A marked range of steps in the units of the drawing."""

    x: float
    width: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart, ready to be written down."""

    title: str
    note: str
    width: int
    height: int
    left: float
    right: float
    top: float
    bottom: float
    x_min: int
    x_max: int
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Drawn, ...]
    bands: tuple[Band, ...]

    @property
    def drawn_points(self) -> list[tuple[str, Points]]:
        """Name and thinned points of each line: what the page's script reads out."""
        return [(line.name, line.points) for line in self.lines]


# --- What was logged --------------------------------------------------------------------------------------------------


def merge_history(
    log_history: Iterable[Mapping[str, object]], *, facts: Iterable[Fact] = ()
) -> dict[int, dict[str, float]]:
    """Return every logged number by step and name, infinite and undefined ones too.

    Facts go on past the newest checkpoint's `log_history`; where both know a number, `log_history` counts, and of two
    attempts the later one.
    """
    merged: dict[int, dict[str, float]] = {}
    for fact in facts:
        if isinstance(fact.body, Logged):
            numbers = {name: float(value) for name, value in fact.body.metrics.items() if _is_number(value)}
            merged.setdefault(fact.body.step, {}).update(numbers)
    for entry in log_history:
        step = entry.get("step")
        if isinstance(step, int):
            numbers = {
                name: float(value)
                for name, value in entry.items()
                if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
            }
            merged.setdefault(step, {}).update(numbers)
    return dict(sorted(merged.items()))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def curve_of(history: Mapping[int, Mapping[str, float]], *, name: str) -> Points:
    """Return the finite points of one metric."""
    return tuple(
        (step, numbers[name]) for step, numbers in history.items() if name in numbers and math.isfinite(numbers[name])
    )


def throughput_curve(facts: Iterable[Fact], *, name: str = "num_tokens") -> Points:
    """Return what a running count gained per second between two logs of one attempt; evaluation and saving included.

    `name` is the count's metric; the empty name counts optimizer steps.
    """
    points: dict[int, float] = {}
    previous: tuple[int, float, float] | None = None
    for fact in facts:
        if isinstance(fact.body, Started):
            previous = None
        if not isinstance(fact.body, Logged) or (name and name not in fact.body.metrics):
            continue
        count = float(fact.body.metrics[name]) if name else float(fact.body.step)
        at = fact.time.timestamp()
        if previous is not None and previous[0] == fact.attempt and at > previous[1] and count > previous[2]:
            points[fact.body.step] = (count - previous[2]) / (at - previous[1])
        previous = (fact.attempt, at, count)
    return tuple(sorted(points.items()))


def redone_steps(facts: Iterable[Fact]) -> tuple[Redone, ...]:
    """Return, for each attempt but the first, what of the one before it had to be trained again."""
    redone: list[Redone] = []
    reached, attempt = 0, 0
    for fact in facts:
        if isinstance(fact.body, Started):
            if attempt and fact.attempt != attempt:
                start = fact.body.resumed_from_step
                redone.append(Redone(start=start, end=max(reached, start), label=f"attempt {fact.attempt}"))
            reached, attempt = fact.body.resumed_from_step, fact.attempt
        elif isinstance(fact.body, Logged):
            reached = max(reached, fact.body.step)
    return tuple(redone)


# --- Geometry ---------------------------------------------------------------------------------------------------------


def build_chart(
    lines: Sequence[Line],
    *,
    title: str,
    note: str = "",
    redone: Sequence[Redone] = (),
    from_zero: bool = False,
    width: int = 1000,
    height: int = 280,
) -> Chart | None:
    """Return the chart of the lines that have points, or None where none has."""
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    steps = [step for line in lines for step, _ in line.points]
    values = [value for line in lines for _, value in line.points]
    x_min, x_max = (min(steps), max(steps)) if len(set(steps)) > 1 else (min(steps) - 1, max(steps) + 1)
    y_values = nice_ticks(min(0.0, *values) if from_zero else min(values), max(values), count=5 if height > 240 else 4)
    labels = format_ticks(y_values)
    left, right = 14 + 7.2 * max(len(label) for label in labels), width - 14.0
    top, bottom = 14.0, height - 30.0

    def x_of(step: float) -> float:
        return left + (step - x_min) / (x_max - x_min) * (right - left)

    def y_of(value: float) -> float:
        return bottom - (value - y_values[0]) / (y_values[-1] - y_values[0]) * (bottom - top)

    def path_of(points: Points) -> str:
        return "M" + "L".join(f"{x_of(step):.1f} {y_of(value):.1f}" for step, value in points)

    def draw(line: Line) -> Drawn:
        thinned = thin(line.points)
        smooth = line.noisy and len(line.points) >= SMOOTHED_FROM
        few = len(thinned) <= 40
        return Drawn(
            name=line.name,
            colour=line.colour,
            dashed=line.dashed,
            path=path_of(thin(smoothed(line.points)) if smooth else thinned),
            faint_path=path_of(thinned) if smooth else "",
            dots=tuple(
                (round(x_of(s), 1), round(y_of(v), 1), f"step {s}: {format_value(v)}") for s, v in thinned if few
            ),
            points=thinned,
        )

    x_values = [value for value in nice_ticks(x_min, x_max, count=8 if width > 700 else 5) if x_min <= value <= x_max]
    whole = [value for value in x_values if value == int(value)]
    return Chart(
        title=title,
        note=note,
        width=width,
        height=height,
        left=left,
        right=right,
        top=top,
        bottom=bottom,
        x_min=x_min,
        x_max=x_max,
        x_ticks=tuple(
            Tick(at=round(x_of(v), 1), label=label) for v, label in zip(whole, format_ticks(whole), strict=True)
        ),
        y_ticks=tuple(Tick(at=round(y_of(v), 1), label=label) for v, label in zip(y_values, labels, strict=True)),
        lines=tuple(draw(line) for line in lines),
        bands=tuple(
            Band(x=round(x_of(r.start), 1), width=round(x_of(min(r.end, x_max)) - x_of(r.start), 1), label=r.label)
            for r in redone
            if x_min <= r.start <= x_max
        ),
    )


def nice_ticks(low: float, high: float, *, count: int) -> list[float]:
    """Return about `count` round values that enclose `low` and `high`; 0 is among them where it is near."""
    if low >= 0 and low <= 0.35 * high:
        low = 0.0
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-30):
        margin = abs(high) / 10 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.10g}") for index in range(first, last + 1)]


def format_ticks(values: Sequence[float]) -> list[str]:
    """Return labels of one form for the ticks of an axis: 0.25, 12k, 2e-5."""
    largest = max((abs(value) for value in values), default=0.0)
    if largest == 0:
        return ["0"] * len(values)
    if largest < 1e-3 or largest >= 1e9:
        return ["0" if value == 0 else _exponential(value, digits=10) for value in values]
    for limit, suffix in ((1e6, "M"), (1e4, "k")):
        if largest >= limit:
            unit = {"M": 1e6, "k": 1e3}[suffix]
            return [f"{label}{suffix}" if float(label) else "0" for label in format_ticks([v / unit for v in values])]
    decimals = max((_decimals(value) for value in values), default=0)
    return [f"{value:.{decimals}f}" for value in values]


def _decimals(value: float) -> int:
    text = f"{value:.10f}".rstrip("0")
    return len(text) - text.index(".") - 1


def format_value(value: float) -> str:
    """Return a number for reading: four significant digits, an exponent only where it helps."""
    if not math.isfinite(value):
        return str(value)
    if value and not 1e-3 <= abs(value) < 1e6:
        return _exponential(value, digits=3)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _exponential(value: float, *, digits: int) -> str:
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def thin(points: Points, *, limit: int = MAX_DRAWN_POINTS) -> Points:
    """Return at most `limit` points: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(points) <= limit:
        return points
    kept = {points[0], points[-1]}
    stretches = limit // 2 - 1
    for index in range(stretches):
        stretch = points[len(points) * index // stretches : len(points) * (index + 1) // stretches]
        kept.add(min(stretch, key=lambda point: point[1]))
        kept.add(max(stretch, key=lambda point: point[1]))
    return tuple(sorted(kept))


def smoothed(points: Points) -> Points:
    """Return the mean over a window of about a fiftieth of the points around each; the window shrinks at the ends."""
    sums = list(itertools.accumulate((value for _, value in points), initial=0.0))
    reach = max(len(points) // 100, 1)
    result = []
    for index, (step, _) in enumerate(points):
        around = min(reach, index, len(points) - 1 - index)
        result.append((step, (sums[index + around + 1] - sums[index - around]) / (2 * around + 1)))
    return tuple(result)
