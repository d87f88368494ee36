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
from transect.view.walk import OrderError, Use, Walk

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
    output with respect to each site exists, is finite and is not zero; scores that only rank blocks have none.
    Raises InputError with module path, identity and residual. Cost: one forward and one backward pass on `ids`.
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

    def keep(site: str, tap: Tap) -> Use:
        def use(place: int, tensor: Tensor) -> Tensor | None:
            if (site, place) in raw:
                raise OrderError(f"layer {place}: site {site!r} fired twice at {tap}")
            fixed = tensor.is_floating_point() and not tensor.requires_grad  # weights that a rule does not learn
            if fixed:
                tensor = tensor.detach().requires_grad_()
            raw[site, place] = tensor
            values[site, place] = site_value(site, place, tap, tensor, (ids.shape[0], ids.shape[1])).detach()
            return tensor if fixed else None

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

    for addition in known.additions:
        stream, number = seen[addition.source, layer], addition.number
        terms = [seen[f"{name}_out", layer] for name in addition.adds]
        if addition.sum_norm is not None:
            terms = [normed(addition.sum_norm, *terms)()]
        if number:
            terms.insert(0, stream if number == 1 else number * stream)
        target = "resid[l+1]" if addition.target == NEXT else addition.target
        branch = known.taps[f"{addition.adds[-1]}_out"].module if addition.adds else str(addition.norm)
        yield f"{target} = {addition}", branch, seen[addition.target, layer], normed(addition.norm, *terms)
    for addition in known.additions:
        for name in addition.adds:
            received, path = at(f"{name}_in"), known.entry_norms.get(name)
            if received is not None:
                text = f"{name}_in = LN({addition.source})" if path else f"{name}_in = {addition.source}"
                yield text, known.taps[f"{name}_in"].module, received, normed(path, seen[addition.source, layer])
    if layer + 1 < view.num_layers:
        yield "resid[l+1] enters the next layer", "", seen["resid", layer + 1], lambda: seen[NEXT, layer]
    yield from _projections(view, known, at, layer)


def _projections(view: "View", known, at, layer: int):
    """The branch is the last linear map of its hidden tensor, unless an output norm or activation is between them."""
    module = view.layers[layer]
    for half, path in known.last_maps.items():
        source, target = "heads_out" if half == "attn" else f"{half}_hidden", f"{half}_out"
        hidden, out = at(source), at(target)
        normed = known.output_norms and half in known.sublayers
        if hidden is not None and out is not None and half not in known.bent and not normed:
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
    inert, ranking = [], 0
    for site, layer in keys:
        grad = found.get((site, layer))
        if grad is None and site.endswith("router_logits"):  # scores that only rank: what they do is `selected`
            ranking += 1
            continue
        if grad is None or not bool(torch.isfinite(grad).all()):
            path = f"{view.layer_path(layer)}.{view.maps[layer].taps[site]}"
            why = "does not reach" if grad is None else "has a gradient that is not finite at"
            raise InputError(f"{view.name} is refused: changing {site}[{layer}] at {path} {why} the output")
        if not bool(grad.any()):
            inert.append(f"{site}[{layer}]")
    return len(keys) - len(inert) - ranking, tuple(inert)
