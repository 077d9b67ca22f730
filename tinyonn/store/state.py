"""The state of a training as tensors by name and a JSON text: model, optimisers, random numbers and other objects.

model.NAME                parameters and buffers, as in the model's state dict, without the prefixes of wrappers
optimizer.NAME.KEY        the optimiser's state of a parameter
object.NAME.PATH          tensors in the state of another object
@state                    JSON: everything else; in it, {"$tensor": name} stands for a tensor and {"$tuple": [...]} for a tuple
@random/RANK              JSON: the random states of a process
"""

from __future__ import annotations

import base64
import contextlib
import copy
import functools
import json
import random
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import listed, shown
from .errors import StoreError
from .layout import Layout, TensorKind

STATE = "@state"
RANDOM = "@random/"
# Wrappers whose state dict is made of copies, or which keep several models.
UNSUPPORTED = ("FullyShardedDataParallel", "DataParallel", "DeepSpeedEngine")
_PREFIXES = ("_orig_mod.", "_checkpoint_wrapped_module.")
_DTYPES = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64, torch.complex64,
}  # fmt: skip


class Stateful(Protocol):
    """An object with a state dict of tensors and of what JSON can hold."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


class TrainingState:
    """The state of a model, its optimisers and other objects.

    Args:
        model: a module, or one wrapped by `DistributedDataParallel`, `torch.compile` or `fully_shard`.
        optimizers: of its parameters.
        objects: others, by name.
        rank: of this process.
    """

    def __init__(self, model: nn.Module, optimizers: Iterable[Optimizer], objects: Mapping[str, Stateful], rank: int) -> None:
        self.model = unwrapped(model)
        for module in self.model.modules():
            if type(module).__name__ in UNSUPPORTED:
                raise StoreError(
                    f"model must be sharded by fully_shard or wrapped by DistributedDataParallel, got {type(module).__name__}."
                )
        self.optimizers = list(optimizers)
        self.objects = dict(objects)
        self.rank = rank

    def tensors(self) -> dict[str, Tensor]:
        """Parameters, buffers and the optimisers' state, not copied."""
        found = self._named_of_model()
        for name, parameter, optimizer in self._held():
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    full = f"optimizer.{name}.{key}"
                    if full in found:
                        raise StoreError(f"{name} must have the state of one optimiser, got that of two; use one for each parameter.")
                    found[full] = value
        for name, tensor in found.items():
            _check_dtype(name, tensor)
            _check_memory(name, tensor)
        return found

    def collect(self, extra: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """All tensors, and the JSON texts of this process by name.

        Args:
            extra: further values for the JSON text.

        Raises:
            StoreError: a value is neither a tensor nor JSON.
        """
        self._check_model()
        tensors = self.tensors()
        state: dict[str, Any] = {"extra": _encoded(dict(extra), "@extra", tensors)}
        state["optimizers"] = [self._optimizer(optimizer, index, tensors) for index, optimizer in enumerate(self.optimizers)]
        state["objects"] = {name: _encoded(one.state_dict(), name, tensors) for name, one in self.objects.items()}
        texts = {f"{RANDOM}{self.rank}": json.dumps(random_state())}
        if not self.rank:
            texts[STATE] = json.dumps(state)
        return tensors, texts

    def trained(self) -> frozenset[str]:
        """Names of the tensors that an optimiser changes, without those of its state."""
        return frozenset(f"model.{name}" for name, _, _ in self._held())

    def check(self, layout: Layout, text: str) -> None:
        """Compares a saved state with this model, these optimisers and objects; changes nothing.

        Args:
            layout, text: of the saved state.

        Raises:
            StoreError: they differ; the message names the first three tensors that do.
        """
        state = json.loads(text)
        number = len(state["optimizers"])
        if number != len(self.optimizers):
            raise StoreError(f"optimizer must be {number} optimisers as in the store, got {len(self.optimizers)}.")
        missing = [name for name in self.objects if name not in state["objects"]]
        if missing:
            raise StoreError(f"objects must be among those of the store, {listed(state['objects'])}, got {listed(missing)}.")
        own = self._named_of_model()
        self._check_same(own, {name: kind for name, kind in layout.tensors.items() if name.startswith("model.")})
        for name, tensor in own.items():
            _check_memory(name, tensor)
        held = {name for name, _, _ in self._held()}
        lost = [name for name in _optimizer_kinds(layout) if name not in held]
        if lost:
            raise StoreError(f"the store has the optimiser's state of {listed(lost, 3)}, which this optimiser does not train.")
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            self._check_groups(optimizer, saved["groups"])

    def targets(self, layout: Layout) -> dict[str, Tensor]:
        """Tensors that a saved state is read into: those of the model and of the optimisers, new ones where an optimiser has none of that
        kind. Changes nothing; the state must have been checked."""
        found = self._named_of_model()
        held = {name: (parameter, optimizer) for name, parameter, optimizer in self._held()}
        for name, kinds in _optimizer_kinds(layout).items():
            parameter, optimizer = held[name]
            for key, kind in kinds.items():
                value = optimizer.state.get(parameter, {}).get(key)
                fits = (
                    isinstance(value, Tensor) and value.dtype == kind.dtype and tuple(value.shape) == kind.shape and not _is_expanded(value)
                )
                found[f"optimizer.{name}.{key}"] = value if fits else _like(parameter, key, kind, optimizer)
        return found

    def load_copies(self, targets: Mapping[str, Tensor]) -> None:
        """Gives the model what its state dict makes anew, such as a module's extra state, after the targets were read."""
        held = {_address(tensor) for tensor in (*self.model.parameters(), *self.model.buffers())}
        copies = {name: targets[f"model.{clean(name)}"] for name in self._of_model()}
        copies = {name: tensor for name, tensor in copies.items() if tensor.numel() and _address(tensor) not in held}
        if copies:
            self.model.load_state_dict(copies, strict=False)

    def object_states(self) -> dict[str, Any]:
        """Copies of the objects' states."""
        return {name: copy.deepcopy(one.state_dict()) for name, one in self.objects.items()}

    def bring_back(self, states: Mapping[str, Any]) -> None:
        """Sets the objects' states to those that `object_states` returned, after an error."""
        for name, state in states.items():
            with contextlib.suppress(Exception):  # the error before it is the one to see
                self.objects[name].load_state_dict(state)

    def load_objects(self, text: str, tensors: Mapping[str, Tensor]) -> None:
        """Sets the objects' states.

        Args:
            text: of the saved state.
            tensors: in the states of objects, by name.
        """
        states = json.loads(text)["objects"]
        for name, one in self.objects.items():
            one.load_state_dict(decoded(states[name], tensors))

    def load_optimizers(self, layout: Layout, text: str, targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        """Sets the optimisers' state and groups, after the targets were read."""
        kinds = _optimizer_kinds(layout)
        saved_optimizers = decoded(json.loads(text)["optimizers"], tensors)
        for optimizer, saved in zip(self.optimizers, saved_optimizers, strict=True):
            for group, before in zip(optimizer.param_groups, saved["groups"], strict=True):
                for key, value in before["values"].items():
                    if isinstance(group.get(key), Tensor):
                        group[key].fill_(value)
                    else:
                        group[key] = value
        others = {id(optimizer): saved["other"] for optimizer, saved in zip(self.optimizers, saved_optimizers, strict=True)}
        for name, parameter, optimizer in self._held():
            state = {key: targets[f"optimizer.{name}.{key}"] for key in kinds.get(name, {})}
            state |= others[id(optimizer)].get(name, {})
            optimizer.state.pop(parameter, None)
            if state:
                optimizer.state[parameter] = state

    def extra(self, text: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """The further values of a saved state."""
        found: dict[str, Any] = decoded(json.loads(text)["extra"], tensors)
        return found

    def _named_of_model(self) -> dict[str, Tensor]:
        return {f"model.{clean(name)}": tensor for name, tensor in self._of_model().items()}

    def _of_model(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.model.state_dict().items() if isinstance(value, Tensor)}

    def _check_model(self) -> None:
        """StoreError if the state dict has something else than tensors."""
        other = [name for name, value in self.model.state_dict().items() if not isinstance(value, Tensor) and value is not None]
        if other:
            raise StoreError(f"the model's state dict must have tensors only, got {listed(other, 3)} with something else.")
        empty = [name for name, value in self.model.named_parameters() if value.is_meta]
        if empty:
            raise StoreError(f"parameters must have values, got {listed(empty, 3)} on the meta device; load its weights first.")

    def _held(self) -> Iterable[tuple[str, nn.Parameter, Optimizer]]:
        """Trained parameters with their names and optimisers."""
        names = {parameter: clean(name) for name, parameter in self.model.named_parameters()}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter not in names:
                        raise StoreError(f"optimizer must train parameters of the model, got one of shape {tuple(parameter.shape)}.")
                    yield names[parameter], parameter, optimizer

    def _optimizer(self, optimizer: Optimizer, index: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
        names: dict[Any, str] = {parameter: clean(name) for name, parameter in self.model.named_parameters()}
        groups = []
        for number, group in enumerate(optimizer.param_groups):
            values = {key: value for key, value in group.items() if key != "params"}
            for key, value in values.items():  # a learning rate may be a tensor
                values[key] = value.item() if isinstance(value, Tensor) else value
            groups.append(
                {"params": [names[one] for one in group["params"]], "values": _encoded(values, f"@groups.{index}.{number}", tensors)}
            )
        other = {
            names[parameter]: {key: value for key, value in state.items() if not isinstance(value, Tensor)}
            for parameter, state in optimizer.state.items()
        }
        return {
            "groups": groups,
            "other": _encoded({name: value for name, value in other.items() if value}, f"@optimizers.{index}", tensors),
        }

    def _check_groups(self, optimizer: Optimizer, saved: list[dict[str, Any]]) -> None:
        names = {parameter: clean(name) for name, parameter in self.model.named_parameters()}
        if len(saved) != len(optimizer.param_groups):
            raise StoreError(f"optimizer must have {len(saved)} groups as in the store, got {len(optimizer.param_groups)}.")
        for group, before in zip(optimizer.param_groups, saved, strict=True):
            if [names[one] for one in group["params"]] != before["params"]:
                raise StoreError("optimizer must have the parameters of the store in each group, in the same order.")

    @staticmethod
    def _check_same(own: Mapping[str, Tensor], saved: Mapping[str, TensorKind]) -> None:
        other = []
        for name in [*saved, *(name for name in own if name not in saved)]:
            short = name.removeprefix("model.")
            if name not in own:
                other.append(f"{short}, which this model does not have")
            elif name not in saved:
                other.append(f"{short}, which the store does not have")
            elif tuple(own[name].shape) != saved[name].shape or own[name].dtype != saved[name].dtype:
                kind = saved[name]
                here = f"{_kind(own[name].dtype)} {tuple(own[name].shape)}"
                other.append(f"{short}, {_kind(kind.dtype)} {kind.shape} in the store and {here} here")
        if other:
            more = f"; {len(other) - 3:,} more differ" if len(other) > 3 else ""
            raise StoreError(f"the store must be of this model; these differ: {'; '.join(other[:3])}{more}.")


def unwrapped(model: nn.Module) -> nn.Module:
    """The module within `DistributedDataParallel` and `torch.compile`."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


@functools.cache
def clean(name: str) -> str:
    """A parameter's name without those of wrappers."""
    for prefix in _PREFIXES:
        name = name.replace(prefix, "")
    return name


def random_state() -> dict[str, Any]:
    """States of the random generators of Python, NumPy and PyTorch, with that of each GPU."""
    version, numbers, gauss = random.getstate()
    kind, keys, place, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    found = {
        "python": [version, _packed(np.array(numbers, np.uint64)), gauss],
        "numpy": [kind, _packed(np.asarray(keys)), int(place), int(has_gauss), float(cached)],
        "torch": _packed(torch.get_rng_state().numpy()),
    }
    if torch.cuda.is_available():
        found["cuda"] = [_packed(state.numpy()) for state in torch.cuda.get_rng_state_all()]
    return found


def set_random_state(found: Mapping[str, Any]) -> None:
    """Sets them."""
    version, numbers, gauss = found["python"]
    random.setstate((version, tuple(int(one) for one in _unpacked(numbers, np.uint64)), gauss))
    kind, keys, place, has_gauss, cached = found["numpy"]
    np.random.set_state((kind, _unpacked(keys, np.uint32), place, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(torch.from_numpy(_unpacked(found["torch"], np.uint8).copy()))
    if "cuda" in found and torch.cuda.is_available() and len(found["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([torch.from_numpy(_unpacked(one, np.uint8).copy()) for one in found["cuda"]])


def _optimizer_kinds(layout: Layout) -> dict[str, dict[str, TensorKind]]:
    """Kinds of the tensors of an optimiser's state, by the names of their parameters and their keys."""
    found: dict[str, dict[str, TensorKind]] = {}
    for full, kind in layout.tensors.items():
        if full.startswith("optimizer."):
            name, _, key = full.removeprefix("optimizer.").rpartition(".")
            found.setdefault(name, {})[key] = kind
    return found


def _like(parameter: Tensor, key: str, kind: TensorKind, optimizer: Optimizer) -> Tensor:
    """A place for an optimiser's state, sharded as its parameter where it has its shape; `step` is on the CPU unless kernels read it."""
    if key == "step":
        group = next(group for group in optimizer.param_groups if any(one is parameter for one in group["params"]))
        device = parameter.device if group.get("capturable") or group.get("fused") else "cpu"
        return torch.empty(kind.shape, dtype=kind.dtype, device=device)
    if tuple(parameter.shape) == kind.shape:
        return torch.empty_like(parameter, dtype=kind.dtype, requires_grad=False)
    return torch.empty(kind.shape, dtype=kind.dtype, device=parameter.device)


def _encoded(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON; tensors are added to `tensors`."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        name = f"object.{path}"
        _check_dtype(name, value)
        if name in tensors:
            raise StoreError(f"{path} must be the only tensor of that name in the states of objects; rename one.")
        tensors[name] = value
        return {"$tensor": name}
    if isinstance(value, tuple):
        return {"$tuple": [_encoded(one, f"{path}.{number}", tensors) for number, one in enumerate(value)]}
    if isinstance(value, list):
        return [_encoded(one, f"{path}.{number}", tensors) for number, one in enumerate(value)]
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _encoded(one, f"{path}.{key}", tensors) for key, one in value.items()}
        return {"$items": [[_encoded(key, path, tensors), _encoded(one, f"{path}.{key}", tensors)] for key, one in value.items()]}
    raise StoreError(f"{path.replace('@extra', 'state')} must be a tensor or a value that JSON can hold, got {shown(value)}.")


def decoded(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """A value from its JSON; tensors are looked up by their names, and None where they are not there."""
    if isinstance(value, list):
        return [decoded(one, tensors) for one in value]
    if isinstance(value, dict):
        if "$tensor" in value:
            return tensors.get(value["$tensor"])
        if "$tuple" in value:
            return tuple(decoded(one, tensors) for one in value["$tuple"])
        if "$items" in value:
            return {decoded(key, tensors): decoded(one, tensors) for key, one in value["$items"]}
        return {key: decoded(one, tensors) for key, one in value.items()}
    return value


def _check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _DTYPES or tensor.layout != torch.strided:
        raise StoreError(f"{name} must be a dense tensor of a type that safetensors holds, got {_kind(tensor.dtype)}, {tensor.layout}.")


def _check_memory(name: str, tensor: Tensor) -> None:
    if _is_expanded(tensor):
        raise StoreError(f"{name} must have memory for each of its values, got an expanded tensor; clone() it.")


def _is_expanded(tensor: Tensor) -> bool:
    """Whether values share memory, so that the tensor cannot be written."""
    return 0 in tensor.stride() and any(size > 1 and not stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _address(tensor: Any) -> int:
    """Where the memory of a tensor, or of this process's part of one, begins."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.untyped_storage().data_ptr()


def _kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _packed(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


def _unpacked(text: str, dtype: Any) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype)
