"""What is known of one layer: where each site is tapped, and how its two branches join the stream."""

from dataclasses import dataclass, field, replace

from transect.view.tensors import Key


@dataclass(frozen=True, slots=True)
class Tap:
    """A place where a site's tensor passes: an input or output of a module of the layer.

    `scale` is the number the model multiplies the tensor with before it becomes the site; `overwritten` says that the
    model writes into the tensor later (falcon adds attention into the FFN's output), so a capture must copy it.
    """

    module: str
    side: str
    key: Key = None
    nth: int = 0
    scale: float = 1.0
    overwritten: bool = False

    def __str__(self) -> str:
        spot = "" if self.key is None else f"[{self.key}]"
        times = "" if self.scale == 1.0 else f" x {self.scale:g}"
        return f"{self.module or '(layer)'}.{self.side}put{spot}{times}"


@dataclass(frozen=True, slots=True)
class LayerMap:
    """The taps of one layer and its residual algebra.

    parallel: resid_next = resid + attn_out + ffn_out. Otherwise resid_mid = N1(resid + attn_out) and
    resid_next = N2(resid_mid + ffn_out), where N1 and N2 are the modules `mid_norm` and `next_norm`, or nothing.
    `sublayers` says which of `attn` and `ffn` exist; `readers` are all inputs through which a sub-layer takes
    `attn_in` or `ffn_in`: an edit of the site must change every one.
    """

    taps: dict[str, Tap]
    missing: dict[str, str]
    sublayers: tuple[str, ...]
    parallel: bool
    mid_norm: str | None = None
    next_norm: str | None = None
    attn_norm: str | None = None
    ffn_norm: str | None = None
    output_norms: tuple[str, ...] = ()
    attn_projection: str | None = None
    ffn_down: str | None = None
    attn_root: str = ""
    sparse: bool = False
    readers: dict[str, tuple[Tap, ...]] = field(default_factory=dict)

    @property
    def layout(self) -> str:
        """The residual layout in the field's words."""
        pre = self.attn_norm is not None or self.ffn_norm is not None
        if self.parallel:
            name = "parallel"
        elif self.mid_norm or self.next_norm:
            name = "post_norm"
        elif self.output_norms:
            name = "sandwich_norm" if pre else "output_norm"
        else:
            name = "pre_norm" if pre else "no_norm"
        scaled = any(self.taps[site].scale != 1.0 for site in ("attn_out", "ffn_out") if site in self.taps)
        return f"{name}_scaled" if scaled else name

    def with_taps(self, taps: dict[str, Tap]) -> "LayerMap":
        """The same map with some taps exchanged."""
        missing = {site: why for site, why in self.missing.items() if site not in taps}
        return replace(self, taps=self.taps | taps, missing=missing)


@dataclass(frozen=True, slots=True)
class ModelMap:
    """Where the layers of a model stand and what each looks like."""

    container: str
    executed: tuple[int, ...]
    layers: tuple[LayerMap, ...]
    final_norm: str | None
    width: int
