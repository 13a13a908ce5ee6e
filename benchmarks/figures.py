"""How figures are written: as many digits as they are worth, with their units and signs."""

from benchmarks.report import Quality

NO_DIFFERENCE = "no difference"
NONE = "–"


def number(value: float, digits: int = 3) -> str:
    """Return a figure with `digits` significant digits and no exponent: 1,430 or 0.0418."""
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - _magnitude(value))
    return f"{value:,.{decimals}f}"


def _magnitude(value: float) -> int:
    return int(f"{value:e}".partition("e")[2])


def span(low: float, high: float) -> str:
    """Return an interval, both ends with as many decimals as tell them apart."""
    digits = 3
    while digits < 6 and low != high and number(low, digits) == number(high, digits):
        digits += 1
    return f"{number(low, digits)}–{number(high, digits)}"


def times(value: float, digits: int = 3) -> str:
    """Return a factor: 4.41 ×."""
    return f"{number(value, digits)} ×"


def factor(value: float) -> str:
    """Return a factor in two digits: 4.4 ×; in three where two say 1.0."""
    return times(value, 3 if 0.95 <= value < 1.05 else 2)


def megabytes(size: float) -> str:
    """Return a size in decimal megabytes, gigabytes from 10,000 of them on."""
    if size >= 1e10:
        return f"{number(size / 1e9)} GB"
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{number(size / 1e3)} kB"


def score(value: float) -> str:
    """Return a metric's value: four decimals below 10, two above."""
    return f"{value:.{_decimals(value)}f}".replace("-", "−")


def difference(quality: Quality, short: bool = False) -> str:
    """Return the signed difference to the baseline, as precise as the value (or one digit less)."""
    assert quality.difference is not None
    return signed(quality.difference, quality.value, short)


def signed(change: float, value: float, short: bool = False) -> str:
    """Return a change of `value` with its sign; ±0 where rounding leaves nothing."""
    text = f"{change:+.{_decimals(value) - short}f}"
    return "±0" if float(text) == 0 else text.replace("-", "−")


def uncertainty(quality: Quality) -> str:
    """Return half of the interval of a difference, ± 0.1, as precise as a short `difference`."""
    assert quality.interval is not None
    low, high = quality.interval
    return f"± {(high - low) / 2:.{_decimals(quality.value) - 1}f}"


def _decimals(value: float) -> int:
    return 4 if abs(value) < 10 else 2
