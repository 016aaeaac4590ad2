"""What a computation makes the host wait for, were it to run on an accelerator; for tests, without one.

A kernel is queued and the host goes on, until it needs a number: then it waits for all that was queued, and
the device idles afterwards. Such places are data-dependent operations and copies between host and device.
Tensors on the `meta` device go through the same code as those of an accelerator, without values; what a wait
would give is answered here by a one, so that all waits of a computation are found and not the first alone.
"""

import inspect
import sys
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers_emo.modeling_emo.modeling_emo import EmoDecoderLayer

aten = torch.ops.aten
# Of the layer itself: a decorator's code is that of all that it decorates.
_LAYER = inspect.unwrap(EmoDecoderLayer.forward).__code__
# Their results have a size, or are a number, that only the device knows.
_DATA_DEPENDENT = {
    aten._local_scalar_dense,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_consecutive,
    aten.unique_dim,
    aten.bincount,
    aten.allclose,
}
# From a list of Python's: made on the host and copied, which waits for the device.
_FROM_HOST = (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy)
_FROM_HOST += (torch.Tensor.new_tensor, torch._C.TensorBase.new_tensor)


@dataclass
class Waits:
    """What was found: `module.function` of the code that did it, and how often."""

    device: str
    ours: Counter = field(default_factory=Counter)
    theirs: Counter = field(default_factory=Counter)
    in_layers: Counter = field(default_factory=Counter)
    made_on_cpu: Counter = field(default_factory=Counter)
    last: str = ""
    steps: int = 1

    def add(self, what: str) -> None:
        """Note a wait of the code that is running."""
        frames, in_layer = [], False
        frame = sys._getframe(1)
        while frame is not None:
            module = frame.f_globals.get("__name__", "")
            if module.startswith(("transformers.", "transformers_emo.")):
                frames.append(f"{module.rpartition('.')[2]}.{frame.f_code.co_name}")
                in_layer |= frame.f_code is _LAYER
                if len(frames) == 1:
                    is_ours = module.startswith("transformers_emo.")
            frame = frame.f_back
        place = f"{frames[0]}: {what}" if frames else f"backward: {what}"
        self.last = place
        if in_layer or not frames:
            self.in_layers[place] += 1
        (self.ours if not frames or is_ours else self.theirs)[place] += 1

    def cpu(self, what: str) -> None:
        """Note a tensor made on the CPU."""
        frame = sys._getframe(1)
        while frame is not None and not frame.f_globals.get("__name__", "").startswith("transformers_emo."):
            frame = frame.f_back
        if frame is not None:
            module = frame.f_globals["__name__"].rpartition(".")[2]
            self.made_on_cpu[f"{module}.{frame.f_code.co_name}: {what}"] += 1


class _Operations(TorchDispatchMode):
    def __init__(self, waits: Waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device, packet = self.waits.device, function.overloadpacket
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_device = any(tensor.device.type == device for tensor in tensors)
        if packet in _DATA_DEPENDENT:
            if on_device:
                self.waits.add(packet.__name__)
            if device != "cpu":
                return self._answer(packet, args, function, kwargs)
        if packet is aten._to_copy and device == "meta" and str(kwargs.get("device")) == "cpu" and on_device:
            self.waits.add("a copy between host and device")
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if (
            packet is aten.index
            and any(t is not None and t.dtype == torch.bool for t in args[1])
            and on_device
        ):
            self.waits.add("index by a mask")
        if packet is aten.repeat_interleave and function._overloadname == "Tensor" and on_device:
            self.waits.add("repeat_interleave by a tensor")
        copies = packet in (aten._to_copy, aten.copy_)
        if device != "cpu" and not copies and on_device and any(t.is_cpu and t.dim() > 0 for t in tensors):
            raise AssertionError(f"{function} got tensors on the CPU and on {device!r}")
        result = function(*args, **kwargs)
        if device != "cpu":
            places = {tensor.device.type for tensor in tensors}
            out = {leaf.device.type for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
            if copies and len(places | out) > 1:
                self.waits.add("a copy between host and device")
            elif "cpu" in out and not tensors:
                self.waits.cpu(packet.__name__)
        return result

    def _is_true(self) -> bool:
        """Yes, but for the question whether all sequences are finished."""
        if not self.waits.last.startswith("utils."):  # transformers.generation.utils
            return True
        frame = sys._getframe(1)
        while frame is not None and frame.f_code.co_name != "_sample":
            frame = frame.f_back
        self.waits.steps -= frame is not None
        return frame is None or self.waits.steps <= 0

    def _answer(self, packet, args, function, kwargs):
        if packet is aten._local_scalar_dense:
            if args[0].dtype == torch.bool:
                return self._is_true()
            return 1.0 if args[0].is_floating_point() else 1
        if packet is aten.equal:
            return True
        if packet is aten.nonzero:
            return args[0].new_empty(args[0].numel(), args[0].dim(), dtype=torch.int64)
        return function(*args, **kwargs)


class _Functions(TorchFunctionMode):
    def __init__(self, waits: Waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        data = args[-1] if args else kwargs.get("data")
        if function not in _FROM_HOST or isinstance(data, torch.Tensor):
            return function(*args, **kwargs)
        device = kwargs.get("device", args[0].device if function in _FROM_HOST[4:] else None)
        result = function(*args, **kwargs | {"device": "cpu"})
        if device is None or torch.device(device).type == "cpu":
            return result
        with torch._C.DisableTorchFunction():
            if result.numel() > 0:
                self.waits.add("a tensor of Python numbers")
            return torch.empty(result.shape, dtype=result.dtype, device=device)


@contextmanager
def host_waits(device: str, steps: int = 1):
    """Find what the host waits for inside the context, with all tensors on one device.

    On meta, generation is told that it is finished after so many steps.
    """
    waits = Waits(device, steps=steps)
    with ExitStack() as stack:
        stack.enter_context(_Operations(waits))
        stack.enter_context(_Functions(waits))
        yield waits
