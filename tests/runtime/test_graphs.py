"""The whole-step CUDA graph: on a GPU against eager steps, elsewhere its order of events and its refusals."""

from __future__ import annotations

import contextlib
import gc

import pytest
import timm
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import timm_gac  # noqa: F401 (registers the models)
from timm_gac.runtime.capture import garbage_kept
from timm_gac.runtime.graphs import GraphedStep

cuda_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
STEPS = 9


def trained(graphed: bool, precision: torch.dtype | None) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights and losses after steps whose learning rate changes, with or without a graph."""
    torch.manual_seed(0)
    model = timm.create_model("test_gac_msresnet", num_classes=10).cuda().to(memory_format=torch.channels_last).train()
    rate = torch.tensor(0.1, device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, fused=True)

    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", precision or torch.bfloat16, enabled=precision is not None):
            loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    run = GraphedStep(step, warmup=3) if graphed else step
    losses = []
    for index in range(STEPS):
        rate.fill_(0.1 / (index + 1))
        images = torch.randn(8, 3, 16, 16, device="cuda").contiguous(memory_format=torch.channels_last)
        losses.append(run(images, torch.randint(10, (8,), device="cuda")).clone())
    if graphed:
        assert run.captured
    return {name: value.clone() for name, value in model.state_dict().items()}, torch.stack(losses).tolist()


@pytest.fixture
def deterministic():
    """cuDNN that gives the same bits for the same step."""
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    yield
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


@cuda_only
@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_graph_and_eager_steps_give_the_same_weights(precision: torch.dtype | None, deterministic) -> None:
    expected, expected_losses = trained(False, precision)
    weights, losses = trained(True, precision)
    assert losses == expected_losses and len(set(losses)) == STEPS
    assert [name for name, value in weights.items() if not torch.equal(value, expected[name])] == []


@cuda_only
def test_graph_of_inference_follows_its_input(deterministic) -> None:
    model = timm.create_model("test_gac_msresnet", num_classes=10).cuda().eval()

    def infer(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(images)

    run = GraphedStep(infer, warmup=1)
    for _ in range(4):
        images = torch.randn(2, 3, 16, 16, device="cuda")
        assert torch.equal(run(images), infer(images))


@cuda_only
def test_autocast_around_the_step_is_refused() -> None:
    run = GraphedStep(lambda x: x * 2, warmup=1)
    x = torch.ones(3, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        run(x)
        with pytest.raises(ValueError, match="within the step"):
            run(x)
    assert not run.captured and run(x).tolist() == [2, 2, 2]


class Cycle:
    """Garbage that only the collector finds, and that says when."""

    def __init__(self, gone: list[str], held: object = None) -> None:
        self.me, self.gone, self.held = self, gone, held

    def __del__(self) -> None:
        self.gone.append("gone")


@pytest.fixture
def eager_collector():
    """Collects at every allocation, almost."""
    before = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    yield
    gc.set_threshold(*before)


def test_no_garbage_is_collected_in_a_capture(eager_collector) -> None:
    gone: list[str] = []
    with garbage_kept():
        Cycle(gone)
        kept = [[] for _ in range(1000)]
        assert gone == [] and len(kept) == 1000
    assert gc.isenabled()
    gc.collect()
    assert gone == ["gone"]
    gc.disable()
    try:
        with garbage_kept():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@cuda_only
def test_a_graph_that_is_garbage_does_not_end_a_capture(eager_collector) -> None:
    """Destroying a graph is not permitted within the capture of another one."""
    gone: list[str] = []

    def captures(step: GraphedStep) -> None:
        for _ in range(2):
            step(torch.ones(1, device="cuda"))
        assert step.captured

    def leaving_garbage(x: torch.Tensor) -> torch.Tensor:
        made = [[] for _ in range(1000)]
        return x + len(made)

    first = GraphedStep(leaving_garbage, warmup=1)
    captures(first)
    gc.disable()
    Cycle(gone, first)
    del first
    gc.enable()
    captures(GraphedStep(leaving_garbage, warmup=1))
    gc.collect()
    assert gone == ["gone"]


@cuda_only
def test_a_capture_that_fails_leaves_the_stream_as_it_was() -> None:
    stream = torch.cuda.current_stream()
    run = GraphedStep(lambda x: x * x.sum().item(), warmup=1)
    x = torch.ones(3, device="cuda")
    assert run(x).tolist() == [3, 3, 3]
    with pytest.raises(RuntimeError):
        run(x)
    assert torch.cuda.current_stream() == stream and not run.captured
    assert (x + 1).tolist() == [2, 2, 2]


class Recorder:
    """Stands in for CUDA's streams and graphs on a machine without them, and writes down what happens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        recorder = self

        class Stream:
            def __init__(self, device: object = None) -> None: ...

            def wait_stream(self, other: object) -> None: ...

        class CUDAGraph:
            def replay(self) -> None:
                recorder.events.append("replay")

            def reset(self) -> None:
                recorder.events.append("reset")

        @contextlib.contextmanager
        def graph(graph: object, **where: object):
            recorder.events.append("begin capture")
            yield
            recorder.events.append("end capture")

        for name, value in {"Stream": Stream, "CUDAGraph": CUDAGraph, "graph": graph}.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream())
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: self.events.append("synchronize"))


def test_every_call_executes_the_step_once(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    seen: list[torch.Tensor] = []

    def step(x: torch.Tensor) -> torch.Tensor:
        recorder.events.append("step")
        seen.append(x)
        return x

    run = GraphedStep(step, warmup=2)
    with FakeTensorMode():
        inputs = [torch.empty(2, 3, device="cuda") for _ in range(5)]
        results = [run(x) for x in inputs]
    # Two eager steps; a capture, which computes nothing, with its replay; then replays.
    assert recorder.events == ["step", "step", "begin capture", "step", "end capture", *3 * ["replay"]]
    assert [seen[i] is inputs[i] for i in range(3)] == [True, True, False]  # the graph reads its own buffer
    assert results[:2] == inputs[:2] and all(result is seen[2] for result in results[2:])


def test_released_graphs_are_gone_and_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    run = GraphedStep(lambda x: recorder.events.append("step"), warmup=1)
    run.release()  # nothing to release yet
    with FakeTensorMode():
        x = torch.empty(2, device="cuda")
        for _ in range(2):
            run(x)
        run.release()
        assert not run.captured
        run(x)
    once = ["begin capture", "step", "end capture", "replay"]
    assert recorder.events == ["step", *once, "synchronize", "reset", *once]


def test_replays_copy_their_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    Recorder(monkeypatch)
    monkeypatch.setattr(GraphedStep, "_check", lambda self, tensors: None)  # CPU tensors show what was copied
    run = GraphedStep(lambda x: x, warmup=1)
    results = [run(torch.full((2,), float(i))) for i in range(4)]
    assert results[0].tolist() == [0, 0]
    assert results[1] is results[3] and results[3].tolist() == [3, 3]


def test_other_shapes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    Recorder(monkeypatch)
    run = GraphedStep(lambda x, y: x, warmup=1)
    with FakeTensorMode():
        x, y = torch.empty(4, 3, device="cuda"), torch.empty(4, dtype=torch.int64, device="cuda")
        run(x, y)
        for other in ((x[:3], y[:3]), (x.half(), y), (x,)):
            for _ in range(2):
                with pytest.raises(ValueError, match=r"expected inputs \(4, 3\) float32 cuda:0, .*drop_last"):
                    run(*other)
        run(x, y)
        with pytest.raises(ValueError, match="drop_last"):
            run(x[:3], y[:3])
        with pytest.raises(ValueError, match="detach"):
            run(x.requires_grad_(), y)


def test_cpu_tensors_no_tensors_and_no_warmup_are_refused() -> None:
    with pytest.raises(ValueError, match="expected CUDA tensors, got one on cpu: move"):
        GraphedStep(lambda x: x)(torch.zeros(2))
    with pytest.raises(ValueError, match=r"expected CUDA tensors, got float.*give a tensor"):
        GraphedStep(lambda x: x)(0.1)
    with pytest.raises(ValueError, match="at least one tensor"):
        GraphedStep(lambda: None)()
    for warmup in (0, -1, True, 2.5):
        with pytest.raises(ValueError, match="expected warmup as an integer >= 1"):
            GraphedStep(lambda x: x, warmup=warmup)
