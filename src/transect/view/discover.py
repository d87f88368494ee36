"""Find the parts of a model by what they compute: the chain of layers, the final norm, and each layer's map."""

import torch
from torch import Tensor, nn

from transect.errors import InputError
from transect.view.branches import Finder
from transect.view.kinds import is_norm
from transect.view.layout import LayerMap, ModelMap
from transect.view.trace import Call, recorded


def discover(base: nn.Module, ids: Tensor) -> ModelMap:
    """The map of a model's layers, from one stirred forward pass on [batch, positions] token ids.

    Layers are the longest chain of calls of like modules of one ModuleList in which each takes what the one before
    returned. Raises InputError when there is no such chain or a layer's residual algebra is not found.
    """
    training = base.training
    base.eval()
    try:
        with torch.no_grad(), recorded(base, stirred=True) as calls:
            base(input_ids=ids, **no_cache(base))
        chain, container = _chain(base, calls)
        layers = tuple(_layer_map(call) for call in chain)
        stream = chain_output(chain[-1])
        final_norm = _final_norm(calls, chain[-1], stream)
    finally:
        base.train(training)
    modules = list(base.get_submodule(container).children())
    executed = tuple(next(i for i, module in enumerate(modules) if module is call.module) for call in chain)
    return ModelMap(container, executed, layers, final_norm, stream.shape[-1])


def no_cache(model: nn.Module) -> dict[str, bool]:
    """The keyword that switches the key-value cache off, where the model takes one."""
    import inspect

    takes = inspect.signature(model.forward).parameters
    return {"use_cache": False} if "use_cache" in takes or "kwargs" in takes else {}


def hidden_key(call: Call) -> int | str | None:
    """Which argument of a layer's call is the stream: the first [batch, positions, width] tensor."""
    wide = {key: item for key, item in call.inputs.items() if item.ndim == 3 and item.is_floating_point()}
    return "hidden_states" if "hidden_states" in wide else next(iter(wide), None)


def chain_output(call: Call) -> Tensor:
    """The stream a layer returns: its output or the first tensor of it."""
    return next(iter(call.outputs.values()))


def _chain(base: nn.Module, calls: list[Call]) -> tuple[list[Call], str]:
    chains: dict[str, list[Call]] = {}
    for path, module in base.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        members = {id(child) for child in module}
        chain = _linked([call for call in calls if id(call.module) in members])
        if chain:
            chains[path] = chain
    if not chains:
        raise InputError(
            f"{type(base).__name__}: no chain of layers found; a model must hold its layers in a ModuleList in which "
            "each layer takes the hidden states the one before returned"
        )
    best_path = max(chains, key=lambda path: len(chains[path]))
    best = chains[best_path]
    for path, other in chains.items():
        if _follows(other, best) or _follows(best, other):
            raise InputError(
                f"{type(base).__name__}: its layers stand in several lists, {best_path} and {path}; "
                "a model must hold them in one"
            )
    return best, best_path


def _follows(second: list[Call], first: list[Call]) -> bool:
    """Whether the stream goes on from one chain into another."""
    key = hidden_key(second[0])
    return key is not None and torch.equal(second[0].inputs[key], chain_output(first[-1]))


def _linked(calls: list[Call]) -> list[Call]:
    """The calls, if each is fed by the one before, changes the stream and owns parameters; else nothing."""
    for index, call in enumerate(calls):
        key = hidden_key(call)
        if key is None or not call.outputs or not any(True for _ in call.module.parameters()):
            return []
        received, returned = call.inputs[key], chain_output(call)
        if received.shape != returned.shape or torch.equal(received, returned):
            return []
        if index and not torch.equal(received, chain_output(calls[index - 1])):
            return []
    return calls


def _layer_map(layer: Call) -> LayerMap:
    key = hidden_key(layer)
    assert key is not None
    stream = layer.inputs[key]
    changed = stream.clone()
    changed[:, -2] += torch.randn(
        changed[:, -2].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).to(changed)
    args = tuple(changed if index == key else item for index, item in enumerate(layer.args))
    kwargs = {name: changed if name == key else item for name, item in layer.kwargs.items()}
    with torch.no_grad(), recorded(layer.module, stirred=True) as again:
        layer.module(*layer.args, **layer.kwargs)
    with torch.no_grad(), recorded(layer.module, stirred=True) as moved:
        layer.module(*args, **kwargs)
    root, root_moved = again[0], moved[0]
    finder = Finder(
        layer=root,
        path=layer.path,
        calls=[call for call in again if call is not root],
        moved=[call for call in moved if call is not root_moved],
        resid=stream,
        resid_next=chain_output(root),
        stream_key=key,
    )
    return finder.layer_map()


def _final_norm(calls: list[Call], last_layer: Call, stream: Tensor) -> str | None:
    """The norm outside the layers that reads resid[L]; None where the stream goes on as it is."""
    for call in calls:
        fed = any(torch.equal(item, stream) for item in call.inputs.values() if item.shape == stream.shape)
        if fed and call.start > last_layer.end and is_norm(call.module):
            return call.path
    return None
