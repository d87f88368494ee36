"""How metrics, units and numbers are written for a reader."""

_NAMES = {
    "cka": "CKA",
    "kl": "KL divergence",
    "r2_heldout": "R² held out",
    "r2_insample": "R² in sample",
    "r2_floor": "R² floor",
    "linearity": "linearity (trained)",
    "cosine_closed_form": "cosine (closed form)",
    "share_mha": "attention share",
    "share_ffn": "FFN share",
    "co_selection": "co-selection",
}
_NO_UNIT = {"", "1", "none", "ratio", "fraction", "cosine", "r2", "count"}


def metric_name(metric: str) -> str:
    """A metric's name in words."""
    return _NAMES.get(metric, metric.replace("_", " "))


def with_unit(metric: str, unit: str) -> str:
    """A metric's name with its unit where that adds something."""
    name = metric_name(metric)
    return name if unit.lower() in _NO_UNIT or unit.lower() in name.lower() else f"{name} ({unit})"


def capital(text: str) -> str:
    """The text with a capital first letter and the rest as it is."""
    return text[:1].upper() + text[1:]


def digits(value: float) -> str:
    """Three significant digits, with separators for thousands and powers of ten for extremes."""
    if value == 0 or 1e-3 <= abs(value) < 1000:
        return f"{value:.3g}".replace("-", "−")
    if 1000 <= abs(value) < 1e7:
        return f"{value:,.0f}".replace("-", "−")
    return f"{value:.2e}".replace("-", "−")
