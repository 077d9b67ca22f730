"""The layers of a model with routed experts, found again where its modules change, and the wrapper that synchronises its gradients."""

from __future__ import annotations

from torch import distributed, nn

from ..nn.routed import Routed

KEEP_OTHER_GRADIENTS = ("DataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")


def routed_layers(model: nn.Module, modules: dict[str, nn.Module] | None = None) -> dict[str, Routed]:
    """The layers of a model with routed experts, by name. TypeError if there is none.

    Args:
        model: the model, or its wrapper.
        modules: all modules of the model by name; None to walk over the model.
    """
    walked = dict(model.named_modules()) if modules is None else modules
    layers = {name: module for name, module in walked.items() if isinstance(module, Routed)}
    if not layers:
        raise TypeError(f"model contains no tinyonn.nn.DynMoE or DynSMHA layer (got {type(model).__name__}).")
    return layers


class Mixtures:
    """The layers of a model with routed experts, by name.

    Attributes:
        model: the model, or its wrapper.
        layers: layers by name.
        wrapper: DistributedDataParallel, around the model or inside a compiled one; None if there is none.
        sharded: whether `fully_shard` was applied to any part of the model.
    """

    layers: dict[str, Routed]
    wrapper: nn.parallel.DistributedDataParallel | None
    sharded: bool

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._search()
        self._check_routers()

    def refresh(self) -> None:
        """Searches the model again if a module was added, removed, replaced or sharded, then checks the routers.

        Raises:
            TypeError: the model contains no such layer, or a wrapper with which its routers cannot learn.
        """
        if any(type(module) is not kind or module._modules != children for module, kind, children in self._tree):
            self._search()
        self._check_routers()

    def router_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of all routers by name."""
        layers = self.layers.items()
        return {f"{name}.router.{inner}".lstrip("."): value for name, layer in layers for inner, value in layer.router.named_parameters()}

    def _search(self) -> None:
        modules = dict(self.model.named_modules())
        self._tree = [(module, type(module), dict(module._modules.items())) for module in modules.values()]
        self.layers = routed_layers(self.model, modules)
        for module in modules.values():
            if type(module).__name__ in KEEP_OTHER_GRADIENTS:
                raise TypeError(
                    f"model must run alone, under DistributedDataParallel or fully_shard, got {type(module).__name__}, whose gradients are "
                    "not those of its routers' parameters."
                )
        self.wrapper = next((module for module in modules.values() if isinstance(module, nn.parallel.DistributedDataParallel)), None)
        self.sharded = False
        if distributed.is_available() and distributed.is_initialized():
            from torch.distributed.fsdp import FSDPModule

            self.sharded = any(isinstance(module, FSDPModule) for module in modules.values())

    def _check_routers(self) -> None:
        """TypeError if gradients that are added to routers' parameters would reach no optimiser, or differ between processes."""
        for name, parameter in self.router_parameters().items():
            mesh = getattr(parameter, "device_mesh", None)
            if self.sharded != (mesh is not None) or (mesh is not None and mesh.ndim > 1):
                raise TypeError(
                    f"{name} must be sharded where the model is, by fully_shard over a mesh of one dimension, got "
                    f"{'no mesh' if mesh is None else mesh}."
                )


def mixtures_of(model: nn.Module, found: Mixtures | None) -> Mixtures:
    """The mixtures of a model: `found`, refreshed, if they are of this model. Raises as `Mixtures.refresh` does."""
    if found is None or found.model is not model:
        return Mixtures(model)
    found.refresh()
    return found
