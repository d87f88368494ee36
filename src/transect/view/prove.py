"""Prove on random tokens that a model's sites are what their names say; refuse the model when they are not."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from transect.errors import InputError
from transect.view.capture import site_value
from transect.view.layout import Tap
from transect.view.sites import NEXT
from transect.view.tensors import eps
from transect.view.walk import OrderError, Walk

if TYPE_CHECKING:
    from transect.view.view import View

Values = dict[tuple[str, int], Tensor]

BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Largest residual of an identity relative to the size of its left side; other dtypes: 8 rounding units."""


@dataclass(frozen=True, slots=True)
class Identity:
    """One identity of one layer: what it says, at which module, and how far its sides are apart."""

    layer: int
    text: str
    module: str
    residual: float


@dataclass(frozen=True, slots=True)
class Proof:
    """The evidence that a view's sites mean what they say.

    `identities` hold within `bound`; every site in `causal` changes the output when it changes; those in `inert` reach
    the output but with weight zero, as behind a projection that is zero. `widths` has each site's width, layer by
    layer.
    """

    identities: tuple[Identity, ...]
    bound: float
    causal: int
    inert: tuple[str, ...]
    widths: tuple[dict[str, int], ...]

    @property
    def worst(self) -> Identity:
        """The identity that holds least well."""
        return max(self.identities, key=lambda identity: identity.residual)


def prove(view: "View", ids: Tensor) -> Proof:
    """Check every identity of every layer and that every site reaches the output.

    Identities: the residual algebra of the layer's layout, norms applied to the stream give the inputs, consecutive
    layers share the stream, the final norm reads resid[L]. Causal check: the gradient of a random projection of the
    output with respect to each site exists, is finite and is not zero. One forward and one backward pass on `ids`.
    Raises InputError with module path, identity and residual.
    """
    bound = BOUNDS.get(view.dtype, 8 * eps(view.dtype))
    try:
        seen, raw, output, final_in = _run(view, ids)
    except OrderError as error:
        raise InputError(f"{view.name} is refused: {error}") from error
    identities = []
    for layer in range(view.num_layers):
        for text, module, left, right in _identities(view, seen, layer):
            residual = _residual(left, right)
            identities.append(Identity(layer, text, module, residual))
            if not residual <= bound:
                path = view.layer_path(layer) + (f".{module}" if module else "")
                raise InputError(
                    f"{view.name} is refused: at {path} the identity {text} does not hold; "
                    f"residual {residual:.3g}, allowed {bound:.3g}"
                )
    if view.final_norm_path is not None:
        identities.append(_final(view, seen[NEXT, view.num_layers - 1], final_in, bound))
    causal, inert = _causal(view, raw, output)
    widths = tuple(
        {site: seen[site, layer].shape[-1] for site in view.maps[layer].taps} for layer in range(view.num_layers)
    )
    return Proof(tuple(identities), bound, causal, inert, widths)


def _final(view: "View", stream: Tensor, final_in: list[Tensor], bound: float) -> Identity:
    """The final norm reads resid[L]."""
    path = str(view.final_norm_path)
    residual = _residual(stream, lambda: final_in[0]) if final_in else float("inf")
    if not residual <= bound:
        raise InputError(
            f"{view.name} is refused: at {path} the identity final_in = resid[L] does not hold; "
            f"residual {residual:.3g}, allowed {bound:.3g}"
        )
    return Identity(view.num_layers - 1, "final_in = resid[L]", path, residual)


def _run(view: "View", ids: Tensor) -> tuple[Values, Values, Tensor, list[Tensor]]:
    """Every site's value, the tensor the model itself goes on with at its tap, and the output, with gradients.

    Last comes what the final norm received, once for each call.
    """
    values: Values = {}
    raw: Values = {}

    def keep(site: str, tap: Tap) -> Callable[[int, Tensor], None]:
        def use(place: int, tensor: Tensor) -> None:
            if (site, place) in raw:
                raise OrderError(f"layer {place}: site {site!r} fired twice at {tap}")
            raw[site, place] = tensor
            values[site, place] = site_value(site, place, tap, tensor, (ids.shape[0], ids.shape[1])).detach()

        return use

    embeddings = view.model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda _, __, out: out if out.requires_grad else out.requires_grad_())
    final_in: list[Tensor] = []
    norm = view.final_norm
    if norm is not None:
        hook = norm.register_forward_pre_hook(lambda _, args: final_in.append(args[0].detach()))
    try:
        with torch.enable_grad(), Walk(view) as walk:
            for layer in range(view.num_layers):
                for site, tap in view.maps[layer].taps.items():
                    walk.tap(layer, tap, keep(site, tap))
            output = view.run(ids, head=True)
    finally:
        handle.remove()
        if norm is not None:
            hook.remove()
    for layer in range(view.num_layers):
        for site, tap in view.maps[layer].taps.items():
            if (site, layer) not in raw:
                raise OrderError(f"layer {layer}: site {site!r} did not fire at {view.layer_path(layer)}.{tap}")
    return values, raw, output, final_in


def _identities(view: "View", seen: Values, layer: int):
    known = view.maps[layer]
    module = view.layers[layer]

    def at(site: str) -> Tensor | None:
        return seen.get((site, layer))

    def normed(path: str | None, *terms: Tensor) -> Callable[[], Tensor]:
        norm = nn.Identity() if path is None else module.get_submodule(path)
        return lambda: norm(sum(terms[1:], terms[0]))

    resid, attn, ffn, mid, after = (at(site) for site in ("resid", "attn_out", "ffn_out", "resid_mid", NEXT))
    assert resid is not None and after is not None
    if mid is not None and attn is not None and ffn is not None:
        left = "LN(resid + attn_out)" if known.mid_norm else "resid + attn_out"
        yield f"resid_mid = {left}", known.taps["attn_out"].module, mid, normed(known.mid_norm, resid, attn)
        left = "LN(resid_mid + ffn_out)" if known.next_norm else "resid_mid + ffn_out"
        yield f"resid[l+1] = {left}", known.taps["ffn_out"].module, after, normed(known.next_norm, mid, ffn)
    else:
        branches = [(name, out) for name, out in (("attn_out", attn), ("ffn_out", ffn)) if out is not None]
        text = "resid + " + " + ".join(name for name, _ in branches)
        text = f"LN({text})" if known.next_norm else text
        right = normed(known.next_norm, resid, *(out for _, out in branches))
        yield f"resid[l+1] = {text}", known.taps[branches[-1][0]].module, after, right
    source = resid if mid is None else mid
    for site, stream_in, path in (("attn_in", resid, known.attn_norm), ("ffn_in", source, known.ffn_norm)):
        received = at(site)
        if received is not None:
            stream_name = "resid" if stream_in is resid else "resid_mid"
            text = f"{site} = LN({stream_name})" if path else f"{site} = {stream_name}"
            yield text, known.taps[site].module, received, normed(path, stream_in)
    if layer + 1 < view.num_layers:
        yield "resid[l+1] enters the next layer", "", seen["resid", layer + 1], lambda: after
    yield from _projections(view, known, at, layer)


def _projections(view: "View", known, at, layer: int):
    """The branch is the last linear map of its hidden tensor, where no output norm stands between them."""
    module = view.layers[layer]
    pairs = (("heads_out", "attn_out", known.attn_projection), ("ffn_hidden", "ffn_out", known.ffn_down))
    for source, target, path in pairs:
        hidden, out = at(source), at(target)
        if hidden is not None and out is not None and path is not None and not known.output_norms:
            linear, scale = module.get_submodule(path), known.taps[target].scale
            yield f"{target} = {path.split('.')[-1]}({source})", path, out, lambda f=linear, x=hidden, c=scale: f(x) * c


def _residual(left: Tensor, side: Callable[[], Tensor]) -> float:
    try:
        right = side()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # tensors of other widths than the identity needs
        return float("inf")
    if left.shape != right.shape:
        return float("inf")
    wide = torch.promote_types(left.dtype, torch.float32)
    left, right = left.detach().to(wide), right.detach().to(wide)
    return float((left - right).abs().max() / left.abs().max().clamp_min(torch.finfo(wide).tiny))


def _causal(view: "View", seen: Values, output: Tensor) -> tuple[int, tuple[str, ...]]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
    keys = [key for key, tensor in seen.items() if tensor.is_floating_point()]
    joined = [key for key in keys if seen[key].requires_grad]
    with torch.enable_grad():
        total = (output * weight).sum()
    grads = torch.autograd.grad(total, [seen[key] for key in joined], allow_unused=True)
    found = dict(zip(joined, grads, strict=True))
    inert = []
    for site, layer in keys:
        grad = found.get((site, layer))
        if grad is None or not bool(torch.isfinite(grad).all()):
            path = f"{view.layer_path(layer)}.{view.maps[layer].taps[site]}"
            why = "does not reach" if grad is None else "has a gradient that is not finite at"
            raise InputError(f"{view.name} is refused: changing {site}[{layer}] at {path} {why} the output")
        if not bool(grad.any()):
            inert.append(f"{site}[{layer}]")
    return len(keys) - len(inert), tuple(inert)
