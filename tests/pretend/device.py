"""An accelerator written in Python: a device `pretend` whose tensors are CPU tensors in a wrapper.

It computes what the CPU computes, and refuses and counts what a GPU would:

- an operation on tensors of two devices, and reads of device memory behind PyTorch's back (`.numpy()`);
- random numbers drawn there, which would be others on every make of device;
- bytes of live tensors, their peak, and a limit, beyond which `torch.OutOfMemoryError` is raised;
- round trips: every time that the host waits for a number of the device (`.item()`, `.cpu()`, `tolist`, `bool()`,
  `nonzero`, a boolean mask as an index, ...), as CUDA would wait.

The device is registered once per process and stays; `is_available` and `device_count` say that it is there only within
`accelerator()`. Two devices, `pretend:0` and `pretend:1`, do not mix either.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
TOTAL = 10**9  # bytes of one device
aten = torch.ops.aten

#: What waits for the device to say how large the result is, or what it is.
WAITING = {
    aten._local_scalar_dense,
    aten._unique2,
    aten.bincount,
    aten.equal,
    aten.is_nonzero,
    aten.masked_select,
    aten.nonzero,
    aten.repeat_interleave,  # without output_size
    aten.unique_dim,
}
#: What PyTorch would make empty and then resize, which a wrapper cannot follow.
RESIZED = (aten.arange, aten.eye, aten.linspace, aten.randperm)
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
CROSSING = {aten._to_copy, aten.copy_}
JOINING = {aten.cat, aten.stack}  # which take not even a number from the CPU


class Refused(RuntimeError):
    """A GPU would have refused it as well."""


@dataclass
class State:
    """What one device holds and has been asked."""

    limit: float = TOTAL  # bytes
    live: Counter[int] = field(default_factory=Counter)  # wrappers of each storage
    sizes: dict[int, int] = field(default_factory=dict)
    taken: int = 0
    peak: int = 0
    waits: Counter[str] = field(default_factory=Counter)  # round trips, by operation
    failing: dict[str, int] = field(default_factory=dict)  # operations that run out of memory: at their n-th call

    def hold(self, held: Tensor) -> int:
        """Count a storage; its key. Raises OutOfMemoryError where it is one too many."""
        storage = held.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if not self.live[key]:
            if self.taken + size > self.limit:
                del self.live[key]
                raise torch.OutOfMemoryError(
                    f"{NAME} out of memory: tried to allocate {size} bytes, {self.taken} of {self.limit:g} are taken"
                )
            self.sizes[key] = size
            self.taken += size
            self.peak = max(self.peak, self.taken)
        self.live[key] += 1
        return key

    def asked(self, packet: Any, waits: bool) -> None:
        """Note an operation. Raises OutOfMemoryError where it is one that is to fail."""
        name = packet.__name__
        if waits:
            self.waits[name] += 1
        if name in self.failing:
            self.failing[name] -= 1
            if not self.failing[name]:
                del self.failing[name]
                raise torch.OutOfMemoryError(f"{NAME} out of memory in {name}")

    def release(self, key: int) -> None:
        self.live[key] -= 1
        if not self.live[key]:
            del self.live[key]
            self.taken -= self.sizes.pop(key)


STATES = {0: State(), 1: State()}
_there = 0  # devices that are visible


class PretendTensor(Tensor):
    """A tensor of the device: `held` is what it holds, on the CPU."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> PretendTensor:
        key = STATES[device.index].hold(held)
        wrapper = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=device,
        )
        wrapper.held = held
        weakref.finalize(wrapper, STATES[device.index].release, key).atexit = False
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(op, args, kwargs or {})

    def __repr__(self, **options: Any) -> str:
        return f"{self.held!r} on {self.device}"

    def numpy(self, **options: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(without_lists(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(without_lists(index), value)

    def data_ptr(self) -> int:
        return self.held.data_ptr()


def without_lists(index: Any) -> Any:
    """Lists of an index as tensors on the CPU: PyTorch would make them on a device that cannot do that."""
    if isinstance(index, tuple):
        return tuple(map(without_lists, index))
    return torch.tensor(index) if isinstance(index, list) else index


def on_device(value: Any) -> bool:
    return isinstance(value, PretendTensor)


def indexed(device: torch.device | str | None) -> torch.device:
    """The device with its number."""
    device = torch.device(device or NAME)
    return torch.device(NAME, device.index or 0)


def mapped(change: Any, value: Any) -> Any:
    """Arguments, or results, with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(change, x) for x in value)
    return {key: mapped(change, x) for key, x in value.items()} if isinstance(value, dict) else value


def computed(op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The result of an operation with tensors of the device among its arguments, or that makes such tensors.

    What it returns of its arguments (in place, or `out`) is the same object.
    """
    packet, known, foreign, devices = op.overloadpacket, {}, [], set()

    def inside(x: Tensor) -> Tensor:
        if isinstance(x, PretendTensor):
            known[id(x.held)] = x
            devices.add(x.device)
            return x.held
        foreign.append(x)
        return x

    inner, options = mapped(inside, args), mapped(inside, kwargs) if kwargs else kwargs
    if len(devices) > 1:
        raise Refused(f"{op}: tensors on {', '.join(sorted(map(str, devices)))}")
    asked = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    device = next(iter(devices), None) or indexed(asked)
    state = STATES[device.index]
    if packet in CROSSING:
        return crossed(op, args, kwargs, state, asked)
    allowed = args[1] if packet in INDEXING else ()
    for x in foreign:
        if (x.dim() or packet in JOINING) and not any(x is index for index in allowed):
            raise Refused(f"{op}: expected all tensors to be on {device}, but found at least one on {x.device}")
    if torch.Tag.nondeterministic_seeded in op.tags and packet is not aten.scaled_dot_product_attention:
        raise Refused(f"{op}: {device} draws other random numbers than the CPU, and takes no generator of the CPU's")
    state.asked(packet, waits(packet, args, kwargs))
    if asked is not None:
        options = options | {"device": "cpu" if asked.type == NAME else asked}
    result = op(*inner, **options)
    if asked is not None and asked.type != NAME:
        return result

    def outside(x: Tensor) -> Tensor:
        wrapper = known.get(id(x))
        if wrapper is None:
            return PretendTensor(x, device)
        assert wrapper.shape == x.shape, f"{op} has resized a tensor"
        return wrapper

    return mapped(outside, result)


def waits(packet: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the host waits for the device."""
    if packet in INDEXING:
        masks = [i for i in args[1] if isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8)]
        number = packet is not aten.index and args[2].dim() == 0  # which is filled in without looking at the mask
        return any(map(on_device, masks)) and not number
    if packet is aten.repeat_interleave:
        return kwargs.get("output_size") is None and isinstance(args[-1], Tensor)
    return packet in WAITING


def crossed(op: Any, args: Any, kwargs: dict[str, Any], state: State, asked: torch.device | None) -> Any:
    """`.to(...)` and `copy_`, which alone may go from one device to another."""
    if op.overloadpacket is aten.copy_:
        target, source, *more = args
        held = source.held if on_device(source) else source
        if not on_device(target):
            state.asked(aten.copy_, True)
        (target.held if on_device(target) else target).copy_(held, *more)
        return target
    (source,) = args
    held = source.held if on_device(source) else source
    to = source.device if asked is None else asked
    if on_device(source) and to.type == "cpu":
        state.asked(aten._to_copy, True)
    if to.type == "meta":
        return op(held, **kwargs)
    copied = op(held, **kwargs | {"device": "cpu"})
    return PretendTensor(copied, indexed(to)) if to.type == NAME else copied


def as_on_the_cpu(attention: Any) -> Any:
    """Attention with the CPU's kernel: PyTorch's choice for other devices rounds differently."""

    @functools.wraps(attention)
    def wrapped(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not on_device(query):
            return attention(query, *args, **kwargs)
        return computed(aten.scaled_dot_product_attention.default, (query, *args), kwargs)

    return wrapped


class Module:
    """`torch.pretend`."""

    @staticmethod
    def is_available() -> bool:
        return _there > 0

    @staticmethod
    def device_count() -> int:
        return _there

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        """All random numbers come from the CPU."""

    @staticmethod
    def get_device_name(device: Any = None) -> str:
        return "Pretend"

    @staticmethod
    def set_per_process_memory_fraction(share: float, device: Any = None) -> None:
        STATES[number(device)].limit = share * TOTAL

    @staticmethod
    def get_per_process_memory_fraction(device: Any = None) -> float:
        return STATES[number(device)].limit / TOTAL


_fallback, _own = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")


def register() -> None:
    """Make the device known to this process."""
    if hasattr(torch, NAME):
        return
    _setup_privateuseone_for_python_backend(NAME, backend_module=Module)
    _fallback.fallback(lambda op, *args, **kwargs: computed(op, args, kwargs), "PrivateUse1")
    for packet in RESIZED:
        for op in (getattr(packet, name) for name in packet.overloads()):
            if not any(argument.name == "out" or "Tensor" in str(argument.type) for argument in op._schema.arguments):
                _own.impl(op, functools.partial(made, op), "PrivateUse1")


def made(op: Any, *args: Any, **kwargs: Any) -> Any:
    return computed(op, args, kwargs)


def made_on_the_cpu(make: Any) -> Any:
    """`torch.tensor` and `torch.as_tensor`, which cannot make a tensor of such a device themselves."""

    @functools.wraps(make)
    def wrapped(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if on_device(data) or device is None or torch.device(device).type != NAME:
            return data.to(device=device, **kwargs) if on_device(data) else make(data, *args, device=device, **kwargs)
        return make(data, *args, **kwargs).to(device)

    return wrapped


def loaded_on_the_cpu(load: Any) -> Any:
    """safetensors' readers, which do not know the device."""

    @functools.wraps(load)
    def wrapped(path: Any, *args: Any, device: Any = "cpu", **kwargs: Any) -> Any:
        if torch.device(device).type != NAME:
            return load(path, *args, device=device, **kwargs)
        return Moved(load(path, *args, **kwargs), device)

    return wrapped


class Moved:
    """A file of tensors, or a dictionary of them, that gives them to the device."""

    def __init__(self, inside: Any, device: Any):
        self.inside, self.device = inside, device

    def __enter__(self) -> Moved:
        self.inside.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.inside.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inside, name)

    def get_tensor(self, name: str) -> Tensor:
        return self.inside.get_tensor(name).to(self.device)

    def __getitem__(self, name: str) -> Tensor:
        return self.inside[name].to(self.device)


def number(device: Any = None) -> int:
    return indexed(None if isinstance(device, int) else device).index if not isinstance(device, int) else device


@contextmanager
def accelerator(devices: int = 1, limit: float = TOTAL) -> Iterator[State]:
    """The device is this machine's accelerator; gives the state of the first one."""
    global _there
    register()
    import safetensors
    import safetensors.torch

    import dqx.models.checkpoint
    import dqx.quant.activations_store
    import dqx.quant.checkpoint.folder

    for state in STATES.values():
        state.peak, state.limit = state.taken, limit
        state.waits.clear()
        state.failing.clear()
    with pytest.MonkeyPatch.context() as patch:
        _there = devices
        patch.setattr(F, "scaled_dot_product_attention", as_on_the_cpu(F.scaled_dot_product_attention))
        patch.setattr(torch, "tensor", made_on_the_cpu(torch.tensor))
        patch.setattr(torch, "as_tensor", made_on_the_cpu(torch.as_tensor))
        for module in (dqx.models.checkpoint, dqx.quant.checkpoint.folder):
            patch.setattr(module, "safe_open", loaded_on_the_cpu(safetensors.safe_open))
        patch.setattr(dqx.quant.activations_store, "load_file", loaded_on_the_cpu(safetensors.torch.load_file))
        memory = {
            "empty_cache": lambda: None,
            "synchronize": lambda device=None: None,
            "memory_allocated": lambda device=None: STATES[number(device)].taken,
            "memory_reserved": lambda device=None: STATES[number(device)].taken,
            "max_memory_allocated": lambda device=None: STATES[number(device)].peak,
            "get_memory_info": lambda device=None: (TOTAL - STATES[number(device)].taken, TOTAL),
            "reset_peak_memory_stats": lambda device=None: setattr(
                STATES[number(device)], "peak", STATES[number(device)].taken
            ),
        }
        for name, function in memory.items():
            patch.setattr(torch.accelerator, name, function)
        try:
            yield STATES[0]
        finally:
            _there = 0
            for state in STATES.values():
                state.limit = TOTAL
