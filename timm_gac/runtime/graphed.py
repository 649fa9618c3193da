"""A network's forward and backward pass as CUDA graphs, in whatever training loop it runs.

`graphed` changes nothing but the forward of one module, so the loop, its optimiser and everything around it stay as
they are. Whatever a graph cannot do runs eagerly, with one line in the log that says why.
"""

from __future__ import annotations

import functools
import inspect
import logging
import weakref
from collections import OrderedDict
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from gac_kernels.backend import requested_backend

from .dtypes import float32_forms
from .fingerprint import STATE, Fingerprint
from .graph_pair import CudaGraphs, Forward, GraphPair, NotGraphableError, Ticket
from .weight_gradients import overlap_requested

_LOGGER = logging.getLogger(__name__)
_Module = TypeVar("_Module", bound=nn.Module)

_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)
_REMEMBERED = 64  # kinds of call that were seen once
_UNUSED_AFTER = 100  # calls after which a graph that was not replayed makes room for another


def graphed(model: _Module, *, warmup: int = 2, max_graphs: int = 4) -> _Module:
    """Replay a network's forward and backward pass as CUDA graphs while it trains: one line before any training loop.

    The host then launches two graphs and the optimiser where it launched hundreds of kernels. The second call of a kind
    (shapes, dtypes, memory format, autocast, train or eval mode of every module, which parameters learn, ...) captures;
    further ones replay. A smaller last batch is such a kind, and so is a network with other layers frozen.

    Gradients are the caller's: accumulation, clipping, GradScaler, hooks on parameters and DDP work as before, and so
    do `copy.deepcopy`, pickle and ``state_dict``; a copy of the network has no graphs yet, and an unpickled one is not
    graphed. Eager, as without this: eval mode, ``no_grad``, `torch.compile`, a forward pass while the backward pass of
    an earlier one is still to come, and, with a line in the log, hooks on inner modules, gradient checkpointing,
    synchronised batch norms and whatever cannot be captured. In a graph, Python does not run: a module that decides by
    Python's random numbers or counts its calls must not be graphed.

    Args:
        model: The network itself, before accelerate or DDP wrap it; on a GPU by its first call. It is changed in place.
        warmup: Passes before each capture, at least 1; what they change is undone.
        max_graphs: Kinds of call to keep graphs of. Each keeps its input, outputs and gradients; all share the memory
            of the activations.

    Returns:
        ``model``. Without CUDA it is as it was, with a line in the log.

    Raises:
        ValueError: ``model`` is no module, is wrapped already or has another forward in its place; ``warmup`` or
            ``max_graphs`` is no integer >= 1.
        RuntimeError: In a backward pass: it is the second one of a forward pass, is to be differentiated itself
            (``create_graph=True``), or a parameter was written since the forward pass.

    Examples:
        >>> model = graphed(model)  # doctest: +SKIP
        >>> for images, labels in loader:  # doctest: +SKIP
        ...     loss = criterion(model(images), labels)
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
    """
    for name, value in {"warmup": warmup, "max_graphs": max_graphs}.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"expected {name} as an integer >= 1, got {value!r}: give one such as 2")
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a torch.nn.Module, got {type(model).__name__}: give the network")
    if isinstance(model, _WRAPPERS):
        raise ValueError(
            f"expected the network, got it inside {type(model).__name__}: call graphed before it is wrapped"
        )
    replaced = vars(model).get("forward")
    own = type(model).forward
    if not (replaced is None or _is_graphed(replaced) or getattr(replaced, "__func__", None) is own):
        raise ValueError(
            f"expected the forward of {type(model).__name__}, got another one in its place: call graphed first, before "
            "accelerate prepares the network"
        )
    if not torch.cuda.is_available():
        _LOGGER.info("%s stays as it is: CUDA graphs need a CUDA device, and there is none", type(model).__name__)
        return model
    vars(model)[STATE] = Graphs(warmup, max_graphs)
    if replaced is None or not _is_graphed(replaced):
        vars(model)["forward"] = MethodType(_graphed_forward(own), model)
        vars(model)["_replicate_for_data_parallel"] = MethodType(_replicate_for_data_parallel, model)
    return model


def ungraphed(model: _Module) -> _Module:
    """Undo `graphed` and free the graphs' memory; a model that is not graphed stays as it is."""
    inner: nn.Module = model.module if isinstance(model, _WRAPPERS) else model
    graphs = vars(inner).pop(STATE, None)
    if isinstance(graphs, Graphs):
        graphs.release()
    replaced = vars(inner).get("forward")
    if getattr(replaced, "__func__", None) is _graphed_forward(type(inner).forward):  # else accelerate's is around it
        del vars(inner)["forward"]
    vars(inner).pop("_replicate_for_data_parallel", None)
    return model


def _is_graphed(forward: Any) -> bool:
    """Whether a forward is a graphed one, or one that accelerate put around it."""
    while forward is not None and not getattr(forward, "is_graphed", False):
        forward = getattr(forward, "__wrapped__", None)
    return forward is not None


@functools.cache
def _graphed_forward(own: Forward) -> Forward:
    """The forward that a graphed module has in the place of its class's."""

    def forward(module: nn.Module, *inputs: Any, **named: Any) -> Any:
        graphs = None if torch.compiler.is_compiling() else vars(module).get(STATE)
        if graphs is None:
            return own(module, *inputs, **named)
        return graphs.run(module, own, inputs, named)

    forward.is_graphed = True  # type: ignore[attr-defined]
    forward.__doc__ = own.__doc__
    forward.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]  # transformers' Trainer looks at it
    return forward


def _replicate_for_data_parallel(module: nn.Module) -> nn.Module:
    """A replica of `nn.DataParallel` runs its own class's forward, eagerly: ours belongs to the module it came from."""
    replica: nn.Module = type(module)._replicate_for_data_parallel(module)
    for name in ("forward", STATE, "_replicate_for_data_parallel"):
        vars(replica).pop(name, None)
    return replica


class Graphs:
    """The graphs of one module, and what decides between them and the eager pass; arguments as of `graphed`."""

    backend: Any = CudaGraphs

    def __init__(self, warmup: int, max_graphs: int) -> None:
        self.warmup, self.max_graphs = warmup, max_graphs
        self._cuda: Any = None
        self._pairs: dict[tuple[Any, ...], _Kept] = {}
        self._seen: OrderedDict[int, bool] = OrderedDict()  # kinds of call, and whether one cannot be captured
        self._fingerprint: Fingerprint | None = None  # of the module at the last call
        self._pending: weakref.ref[Ticket] | None = None
        self._logged: set[str] = set()
        self._calls = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Graphs:
        return type(self)(self.warmup, self.max_graphs)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.warmup, self.max_graphs)

    @property
    def count(self) -> int:
        """How many kinds of call have graphs."""
        return len(self._pairs)

    def release(self) -> None:
        """Forget all graphs."""
        if self._cuda is not None:
            self._cuda.synchronize()
        self._pairs.clear()
        self._seen.clear()
        self._fingerprint = self._cuda = None

    def run(self, module: nn.Module, own: Forward, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """A forward pass of the module, from a graph or eagerly."""
        if not module.training or not torch.is_grad_enabled() or self._in_other_hands(inputs):
            return own(module, *inputs, **named)
        reason, key = self._why_eager(module, inputs, named)
        if reason is None:
            before = None if self._pending is None else self._pending()
            if before is not None and not before.used:
                reason = "an earlier forward pass still waits for its backward pass"
        if reason is not None:
            self._log(module, reason)
            return own(module, *inputs, **named)
        found = self._find(module, own, inputs, key)
        if found is None:
            return own(module, *inputs, **named)
        ticket = Ticket(found.versions())
        self._pending = weakref.ref(ticket)
        return found(inputs, ticket)

    def _in_other_hands(self, inputs: tuple[Any, ...]) -> bool:
        """Whether the call is not an ordinary one on the device: traced, transformed, or part of somebody's graph."""
        return (
            not all(isinstance(x, Tensor) and x.device.type == self.backend.device_type for x in inputs)
            or torch.jit.is_tracing()
            or overlap_requested()  # GraphedStep, which captures all of it
            or torch._C._len_torch_dispatch_stack() > 0
            or torch._C._functorch.peek_interpreter_stack() is not None
            or torch._C._current_graph_task_id() != -1  # a checkpoint that recomputes
            or self.backend.is_capturing()
        )

    def _why_eager(
        self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[str | None, tuple[Any, ...]]:
        """Why a call cannot come from a graph (None if it can), and its kind."""
        if self._fingerprint is None or not self._fingerprint.holds():
            self._fingerprint = Fingerprint(module)
        reason = self._fingerprint.reason
        if named or not inputs:
            reason = f"it was called with {', '.join(named) or 'nothing'} by name, not with tensors by position"
        elif any(type(x) not in (Tensor, nn.Parameter) for x in inputs):
            reason = "an input is of a subclass of Tensor"
        elif _has_any_global_hook():
            reason = "there are hooks on all modules"
        elif torch.is_anomaly_enabled():
            reason = "anomaly detection reads values on the host"
        elif torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            reason = "hooks on saved tensors (checkpointing, offloading) see each activation"
        if reason is not None:
            return reason, ()
        device = inputs[0].device
        cudnn = torch.backends.cudnn
        key = (
            *[(x.shape, x.stride(), x.dtype, x.device, x.requires_grad) for x in inputs],
            torch.is_autocast_enabled(device.type),
            torch.get_autocast_dtype(device.type),
            (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, torch.are_deterministic_algorithms_enabled()),
            float32_forms(),
            requested_backend(),
            self._fingerprint,
        )
        return None, key

    def _find(self, module: nn.Module, own: Forward, inputs: tuple[Any, ...], key: tuple[Any, ...]) -> GraphPair | None:
        """The graphs of a kind of call, captured now if it is the second of its kind."""
        self._calls += 1
        there = self._pairs.get(key)
        if there is not None:
            there.last_call = self._calls
            return there.pair
        kind = hash(key)
        failed = self._seen.get(kind)
        self._seen[kind] = bool(failed)
        self._seen.move_to_end(kind)
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
            self._log(module, f"more than {_REMEMBERED} kinds of call came, such as batches of ever other shapes")
        if failed is not False or not self._make_room(module):
            return None
        pair = self._capture(module, own, inputs)
        if pair is None:
            self._seen[kind] = True
            return None
        self._forget([other for other, one in self._pairs.items() if one.pair.addresses != pair.addresses])
        self._pairs[key] = _Kept(pair, self._calls)
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        _LOGGER.info("%s replays CUDA graphs for inputs of shape %s", type(module).__name__, shapes)
        return pair

    def _capture(self, module: nn.Module, own: Forward, inputs: tuple[Any, ...]) -> GraphPair | None:
        """The graphs, or None where there can be none; the log says why."""
        if self._cuda is None:
            self._cuda = self.backend(inputs[0].device)
        try:
            return GraphPair(module, own, inputs, self._cuda, self.warmup)
        except NotGraphableError as reason:
            self._log(module, str(reason))
        except Exception as error:  # the eager pass that follows raises what is not the capture's own
            first: BaseException = error
            while first.__context__ is not None:  # the end of a failed capture raises once more
                first = first.__context__
            line = (str(first).strip().splitlines() or [""])[0]
            self._log(module, f"capturing failed with {type(first).__name__}: {line}", logging.WARNING)
        return None

    def _make_room(self, module: nn.Module) -> bool:
        """Whether one more kind of call may have graphs; those that nobody has used for long go."""
        if len(self._pairs) < self.max_graphs:
            return True
        oldest = min(self._pairs, key=lambda key: self._pairs[key].last_call)
        if self._calls - self._pairs[oldest].last_call < _UNUSED_AFTER:
            self._log(module, f"it has graphs for {self.max_graphs} other kinds of call (max_graphs)")
            return False
        self._forget([oldest])
        return True

    def _forget(self, keys: list[tuple[Any, ...]]) -> None:
        if keys:
            self._cuda.synchronize()
        for key in keys:
            del self._pairs[key]

    def _log(self, module: nn.Module, reason: str, level: int = logging.INFO) -> None:
        if reason not in self._logged:
            self._logged.add(reason)
            _LOGGER.log(level, "%s runs eagerly here, not as CUDA graphs, as %s", type(module).__name__, reason)


class _Kept:
    """A pair of graphs and the number of the last call that used it."""

    def __init__(self, pair: GraphPair, last_call: int) -> None:
        self.pair, self.last_call = pair, last_call
