"""What is known of one layer: where each site is tapped, and how its branches join the stream."""

from collections.abc import Mapping
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
class Addition:
    """One step of the stream: target = N(number * source + M(the outputs of the sub-layers in `adds`)).

    `source` and `target` are stream sites; `number` is 1 unless the model weights its residual (0: it has none there);
    `norm` is the module N, or nothing; `sum_norm` is M, where several outputs are normed together. A learned number is
    the one that the model had when its view was made. Without sub-layers the stream only passes the norm.
    """

    adds: tuple[str, ...]
    source: str
    target: str
    number: float = 1.0
    norm: str | None = None
    sum_norm: str | None = None

    def __str__(self) -> str:
        terms = [f"{name}_out" for name in self.adds]
        if self.sum_norm:
            terms = [f"LN({' + '.join(terms)})"]
        if self.number:
            terms.insert(0, self.source if self.number == 1 else f"{self.number:g} {self.source}")
        total = " + ".join(terms)
        return f"LN({total})" if self.norm else total


@dataclass(frozen=True, slots=True)
class LayerMap:
    """The taps of one layer and its residual algebra.

    `additions` follow each other from resid to resid_next. The other fields go by half, a sub-layer (`attn`, `ffn`,
    `ffn2`) or `inner`, the FFN inside attention: `entry_norms` the norm between the stream and the half's input;
    `last_maps` its last linear map; `bent` those whose output passes an activation after it; `roots` the module that
    holds it and nothing else, where there is one; `blocks` how many blocks a sparse one has. `output_norms` are the
    sub-layers' own. `readers` are all inputs through which a half takes `attn_in`, `ffn_in`, ...: an edit of the site
    must change every one.
    """

    taps: dict[str, Tap]
    missing: dict[str, str]
    additions: tuple[Addition, ...]
    entry_norms: Mapping[str, str] = field(default_factory=dict)
    output_norms: tuple[str, ...] = ()
    last_maps: Mapping[str, str] = field(default_factory=dict)
    bent: tuple[str, ...] = ()
    roots: Mapping[str, str] = field(default_factory=dict)
    blocks: Mapping[str, int] = field(default_factory=dict)
    attn_root: str = ""
    readers: dict[str, tuple[Tap, ...]] = field(default_factory=dict)

    @property
    def sublayers(self) -> tuple[str, ...]:
        """The sub-layers that exist, in the order in which they are added."""
        return tuple(name for addition in self.additions for name in addition.adds)

    @property
    def parallel(self) -> bool:
        """Whether attention and FFN are added at once: resid_next = resid + attn_out + ffn_out."""
        return any("attn" in addition.adds and len(addition.adds) > 1 for addition in self.additions)

    @property
    def sparse(self) -> bool:
        """Whether the layer has a sparse FFN."""
        return bool(self.blocks)

    @property
    def mid_norm(self) -> str | None:
        """The norm that the stream passes before resid_mid."""
        return next((a.norm for a in self.additions if a.target == "resid_mid"), None)

    @property
    def next_norm(self) -> str | None:
        """The norm that the stream passes before it leaves the layer."""
        return self.additions[-1].norm

    def addition(self, name: str) -> Addition | None:
        """The addition of a sub-layer; None where the layer has no such sub-layer."""
        return next((addition for addition in self.additions if name in addition.adds), None)

    @property
    def layout(self) -> str:
        """The residual layout in the field's words."""
        if self.parallel:
            name = "parallel"
        elif any(addition.norm for addition in self.additions):
            name = "post_norm"
        elif self.output_norms or any(addition.sum_norm for addition in self.additions):
            name = "sandwich_norm" if self.entry_norms else "output_norm"
        else:
            name = "pre_norm" if self.entry_norms else "no_norm"
        if any(addition.number != 1.0 for addition in self.additions):
            name = f"{name}_weighted"
        scaled = any(self.taps[f"{half}_out"].scale != 1.0 for half in self.sublayers)
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
