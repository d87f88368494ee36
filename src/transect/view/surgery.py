"""Build a second model that is an edited one: layers moved, config entries moved with them, removed parts set to zero.

Nothing is told by name: which numbers silence a part is tried on random tokens, and that a layer stands in its new
place as it was is told by comparing the two, module by module.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from transect.view.experts import experts_of, one
from transect.view.kinds import below, is_experts, is_linear, is_norm
from transect.view.order import PER_LAYER
from transect.view.own import moved, settings_of
from transect.view.sites import HALVES

if TYPE_CHECKING:
    from transect.view.view import View

Values = dict[str, Tensor]
"""New values of parameters, by their names in the model."""

_PLACES = ("layer_idx", "layer_id")
"""Attributes that say where a layer stands; they are meant to differ."""


class InexpressibleError(Exception):
    """The architecture has no weights and no config for this edit; the message says why."""


def refuse_shared(view: "View") -> None:
    """Raise InexpressibleError when one module serves several layers, so that no layer can differ from the others."""
    if len(set(view.modules)) < view.num_layers:
        raise InexpressibleError("its layers share their weights, so that none can be changed or moved by itself")


def silenced(view: "View", part: str, layer: int, index: int | None, values: Values) -> Values:
    """The values with those added that make a half of a layer, a `head` or an `expert` add exactly zero.

    Tried in this order: the branch's own output norm, its last linear map, and for a sparse FFN the last maps of its
    experts and of what is added to them. Raises InexpressibleError when none makes the branch zero.
    """
    if part == "head":
        return values | _without_head(view, layer, int(index or 0), values)
    if part == "expert":
        return values | _without_expert(view, layer, int(index or 0), values)
    half = HALVES[part]
    site = f"{half}_out"
    for found in _candidates(view, half, layer):
        new = values | _named(view, layer, found)
        with replaced(view.model, new):
            if not _branch(view, layer, site).any():
                return new
    raise InexpressibleError(f"layer {layer} has no weights that can be zero so that {site} is")


def _candidates(view: "View", half: str, layer: int) -> Iterator[dict[nn.Parameter, Tensor]]:
    known, module = view.maps[layer], view.layers[layer]
    for path in known.output_norms:
        weight = getattr(module.get_submodule(path), "weight", None)
        if isinstance(weight, nn.Parameter):
            for fill in (0.0, -1.0):  # the second where the norm multiplies by one more than its weight
                yield _zeros(module.get_submodule(path)) | {weight: torch.full_like(weight, fill)}
    last = known.last_maps.get(half)
    if last is not None:
        yield _zeros(module.get_submodule(last))
    if half in known.blocks:
        yield _sparse(view, layer, half)


def _zeros(module: nn.Module) -> dict[nn.Parameter, Tensor]:
    return {parameter: torch.zeros_like(parameter) for parameter in module.parameters(recurse=False)}


def _sparse(view: "View", layer: int, half: str) -> dict[nn.Parameter, Tensor]:
    """Zeros for the last maps of the experts, and for the map that shared experts, or the bias, beside them end in."""
    zeros: dict[nn.Parameter, Tensor] = {}
    parts = list(_parts(view, layer, half))
    for expert in (other for other in parts if is_experts(other)):
        zeros |= {parameter: torch.zeros_like(parameter) for parameter in _last_of_experts(view, expert)}
    ends = [_zeros(other) for other in parts if is_linear(other)]
    biases = (p for m in parts if not is_norm(m) and not is_linear(m) for p in m.parameters(recurse=False))
    ends += [{parameter: torch.zeros_like(parameter)} for parameter in biases if parameter.ndim == 1]
    with replaced(view.model, _named(view, layer, zeros)):
        rest = _branch(view, layer, f"{half}_out")
        for end in reversed(ends if rest.any() else []):
            negated = {parameter: -parameter.detach() for parameter in end}
            with replaced(view.model, _named(view, layer, negated)):
                odd = torch.equal(_branch(view, layer, f"{half}_out"), -rest)
            if odd:
                return zeros | end
    return zeros


def _parts(view: "View", layer: int, half: str) -> Iterator[nn.Module]:
    """The modules of one FFN: those of its own module, or where it has none all outside attention."""
    known, module = view.maps[layer], view.layers[layer]
    root = known.roots.get(half) if len(known.roots) > 1 else None
    for path, part in module.named_modules():
        if below(path, root) if root else not below(path, known.attn_root):
            yield part


def _last_of_experts(view: "View", experts: nn.Module) -> tuple[nn.Parameter, ...]:
    """The fewest parameters, the last ones first, whose negative makes the output of fused experts its negative."""
    calls: list[tuple[tuple, dict]] = []
    handle = experts.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    with handle, torch.no_grad():
        view.run(_tokens(view))
    args, kwargs = calls[0]  # the router of a sparse FFN may own stacks too, and returns several tensors
    own = list(reversed(list(experts.named_parameters(recurse=False))))
    with torch.no_grad():
        plain = experts(*args, **kwargs)
        if not isinstance(plain, Tensor):
            return ()
        for size in range(1, len(own) + 1):
            for chosen in combinations(own, size):
                with replaced(experts, {name: -parameter.detach() for name, parameter in chosen}):
                    if torch.equal(experts(*args, **kwargs), -plain):
                        return tuple(parameter for _, parameter in chosen)
    return ()


def _without_head(view: "View", layer: int, head: int, values: Values) -> Values:
    """The output projection with zeros where it reads the head's slice of `heads_out`, on the axis that reads it."""
    projection = view.layers[layer].get_submodule(view.maps[layer].taps["heads_out"].module)
    weight = projection.weight
    if not isinstance(weight, nn.Parameter):
        raise InexpressibleError(f"the output projection of layer {layer} is not a plain weight")
    (name,) = _named(view, layer, {weight: weight})
    width = view.site_width(layer, "heads_out") // view.heads(layer)
    seen = torch.zeros(1, view.site_width(layer, "heads_out"), dtype=weight.dtype, device=weight.device)
    seen[:, head * width : (head + 1) * width] = torch.arange(1, width + 1)
    for axis in (1, 0):  # nn.Linear's weight reads along 1, GPT-2's Conv1D along 0
        new = values.get(name, weight.detach()).clone()
        if new.shape[axis] != seen.shape[1]:
            continue
        new.narrow(axis, head * width, width).zero_()
        with torch.no_grad(), replaced(projection, {"weight": new}):
            if torch.equal(projection(seen), projection(torch.zeros_like(seen))):
                return {name: new}
    raise InexpressibleError(f"no rows or columns of the output projection of layer {layer} read head {head} alone")


def _without_expert(view: "View", layer: int, expert: int, values: Values) -> Values:
    """Every stacked weight of the experts with zeros in one expert's slice: what it computes is exactly zero."""
    experts = experts_of(view, layer)
    module = view.layers[layer].get_submodule(experts.path)
    stacked = [weight for weight in module.parameters() if weight.ndim > 1 and len(weight) == experts.count]
    new = {
        name: values.get(name, weight.detach()).clone()
        for weight in stacked
        for name in _named(view, layer, {weight: weight})
    }
    for value in new.values():
        value[expert] = 0
    x = torch.randn(3, view.width, generator=torch.Generator().manual_seed(0)).to(view.device, view.dtype)
    with torch.no_grad(), replaced(view.model, new):
        if not one(view, layer, expert, x, experts).any():
            return new
    raise InexpressibleError(f"layer {layer} has no weights that can be zero so that expert {expert} is")


@contextmanager
def replaced(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let parameters have other values inside the block; the tensors that were there come back after it."""
    parameters = {name: module.get_parameter(name) for name in values}
    before = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = values[name]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = before[name]


def _branch(view: "View", layer: int, site: str) -> Tensor:
    with torch.no_grad(), view.capture((site,), [layer]) as seen:
        view.run(_tokens(view))
        return seen[site, layer]


def _tokens(view: "View") -> Tensor:
    return torch.randint(view.vocab_size, (2, 7), generator=torch.Generator().manual_seed(0))


def _named(view: "View", layer: int, found: Mapping[nn.Parameter, Tensor]) -> Values:
    """The values by name in the model; InexpressibleError for a parameter that something else uses as well."""
    names: dict[int, list[str]] = {}
    for name, parameter in view.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for parameter in found:
        if len(names[id(parameter)]) > 1:
            raise InexpressibleError(f"layer {layer} shares {names[id(parameter)][0]} with {names[id(parameter)][1]}")
    return {names[id(parameter)][0]: value for parameter, value in found.items()}


def rebuilt(view: "View", order: Sequence[int], values: Values) -> PreTrainedModel:
    """A new model of the same class whose layer in place p is layer `order[p]`, with the new values in it.

    Raises InexpressibleError when the class builds another layer in that place than the one that moves there.
    """
    source = view.model
    config = _moved_config(view, order)
    try:
        model: Any = type(source)._from_config(config, dtype=source.dtype)
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise InexpressibleError(f"its config does not allow it: {_first_line(error)}") from error
    container = _path_of(source, view.base.get_submodule(view.container))
    layers = list(model.get_submodule(container).children())
    if len(layers) != len(order):
        raise InexpressibleError(f"its config makes {len(layers)} layers of {len(order)}")
    for place, layer in enumerate(order):
        difference = _difference(view.layers[layer], layers[place])
        if difference is not None:
            raise InexpressibleError(f"layer {layer} cannot stand in place {place}: {difference}")
    state = {name: values.get(name, tensor) for name, tensor in source.state_dict().items()}
    moved = {name: tensor for name, tensor in state.items() if not below(name, container)}
    for place, layer in enumerate(order):
        old = f"{container}.{view.modules[layer]}."
        moved |= {
            f"{container}.{place}.{name.removeprefix(old)}": t for name, t in state.items() if name.startswith(old)
        }
    try:
        model.load_state_dict(moved, strict=True)
    except RuntimeError as error:
        raise InexpressibleError(f"its weights do not fit the new order: {_first_line(error)}") from error
    if source.can_generate():
        model.generation_config = copy.deepcopy(source.generation_config)
    return model.eval()


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split()[:30])


def _path_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(path for path, module in model.named_modules() if module is wanted)


def _moved_config(view: "View", order: Sequence[int]) -> Any:
    """A copy of the config in which the layer count and whatever depends on a layer's number follow the order."""
    config, count = copy.deepcopy(view.model.config), view.num_layers
    if list(order) == list(range(count)):
        return config
    settings = settings_of(view.model)
    if settings is not None:
        config.architecture = moved(settings, order).plain()
        return config
    for name in PER_LAYER:
        entries = getattr(config, name, None)
        if isinstance(entries, (list, tuple)) and len(entries) == count:
            setattr(config, name, type(entries)(entries[index] for index in order))
    config.num_hidden_layers = len(order)
    sparse = [view.maps[layer].sparse for layer in order]
    if isinstance(getattr(config, "mlp_only_layers", None), list):
        config.mlp_only_layers = [place for place, is_sparse in enumerate(sparse) if not is_sparse]
        config.decoder_sparse_step = 1
    if isinstance(getattr(config, "first_k_dense_replace", None), int):
        config.first_k_dense_replace = sparse.index(True) if True in sparse else len(sparse)
    if getattr(config, "attention_types", None) and hasattr(config, "attention_layers"):  # GPT-Neo's two ways to say it
        config.attention_types = [[[kind], 1] for kind in config.attention_layers]
    return config


def _difference(left: nn.Module, right: nn.Module) -> str | None:
    """What sets two layers apart besides their weights and their place: modules, settings, shapes or buffers."""
    ours, theirs = dict(left.named_modules()), dict(right.named_modules())
    for path in dict.fromkeys([*ours, *theirs]):
        where = path or "the layer"
        if path not in ours or path not in theirs:
            return f"it would be built {'without' if path in ours else 'with'} {where}"
        here, there = ours[path], theirs[path]
        if type(here) is not type(there):
            return f"{where} would be of type {type(there).__name__}, not {type(here).__name__}"
        for name in dict.fromkeys([*_settings(here), *_settings(there)]):
            one, other = _settings(here).get(name), _settings(there).get(name)
            if one != other:
                return f"{name} of {where} would be {other}, not {one}"
        for name, buffer in here.named_buffers(recurse=False):
            other = dict(there.named_buffers(recurse=False)).get(name)
            made = name in here._non_persistent_buffers_set  # others move with the weights
            if other is None or other.shape != buffer.shape or (made and not torch.equal(other.cpu(), buffer.cpu())):
                return f"{name} of {where} would be another"
    return None


def _settings(module: nn.Module) -> dict[str, object]:
    skipped = (*_PLACES, "training")
    return {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str)) and k not in skipped}
