"""Random calls of every public op: good ones against the float64 references, bad ones against what an error has to say.

By hand: ``python tests/ops/fuzz.py --good 2400 --bad 1200 --triton 8`` (every eighth good call runs in Triton). A short
part runs with the tests. Values lie on a grid of 1/8 and statistics are powers of two where a neuron compares, so that
float32 is exact and the same neurons fire in float64.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from torch import Tensor

import gac_kernels
from compare import TOLERANCES
from gac_kernels import CIFAR, IMAGENET, LIFSpec, ResidualNorm, use_backend

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SPECS = [CIFAR, IMAGENET, LIFSpec(surrogate="atan", reset="soft"), LIFSpec(0.5, 1.0, "sigmoid"), LIFSpec(decay=0.0)]
OPS = sorted(name for name in gac_kernels.__all__ if f"{name}_reference" in gac_kernels.__all__)
Call = tuple[list[Any], dict[str, Any]]


class Maker:
    """Random arguments of a seed."""

    def __init__(self, seed: int, triton: bool = False) -> None:
        self.random = random.Random(seed)
        self.triton = triton
        self.generator = torch.Generator().manual_seed(seed)
        self.dtypes = [d for d in DTYPES if not (triton and d == torch.float64)]  # float64 runs as plain PyTorch
        self.dtype = self.random.choice(self.dtypes)
        self.spec = self.random.choice(SPECS)
        self.steps = self.random.choice([1, 2, 3, 4, 9])
        self.batch, self.channels = self.random.choice([0, 1, 2, 3]), self.random.choice([1, 2, 3, 5, 17])
        self.size = [self.random.choice([1, 2, 3, 5, 8]) for _ in range(2)]

    def maybe(self, value: Any) -> Any:
        return value if self.random.random() < 0.5 else None

    def tensor(self, *shape: int, dtype: torch.dtype | None = None, spikes: bool = False, scale: int = 24) -> Tensor:
        """Multiples of 1/8 (or 0 and 1), in memory that may be strided, permuted, expanded or channels-last."""
        kind = self.random.choice(["plain", "channels_last", "step", "offset", "permuted", "expanded"])
        full = list(shape)
        if kind == "step":
            full[-1] *= 2
        if kind == "expanded":
            full[self.random.randrange(len(full))] = 1
        if kind == "permuted":
            full.reverse()
        count = 2 if spikes else 2 * scale + 1
        made = torch.randint(count, full, generator=self.generator)
        x = (made if spikes else (made - scale) / 8).to(dtype or self.dtype)
        if kind == "step":
            x = x[..., ::2]
        if kind == "expanded":
            x = x.expand(*shape)
        if kind == "permuted":
            x = x.permute(*reversed(range(x.dim())))
        if kind == "offset":
            x = torch.cat([x.flatten()[:1], x.flatten()])[1:].view(shape) if x.numel() else x
        if kind == "channels_last" and len(shape) == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        return x

    def powers(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return 4.0 ** torch.randint(-1, 2, shape, generator=self.generator).to(dtype)

    def folded(self, channels: int | None = None, **keywords: Any) -> Tensor:
        return self.tensor(self.steps * self.batch, channels or self.channels, *self.size, **keywords)

    def make(self, op: str) -> Call:
        return getattr(self, f"_{op}")()

    def _lif(self) -> Call:
        shape = [self.random.choice([0, 1, 2, 3]) for _ in range(self.random.choice([0, 1, 2, 4]))]
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        state = self.maybe(self.tensor(*shape, dtype=wide) if shape else torch.tensor(0.5, dtype=wide))
        return [self.tensor(self.steps, *shape), self.spec, state], {"return_state": True}

    def _integer_lif(self) -> Call:
        return [self.folded(), self.steps, self.spec], {}

    def _gate(self, static: bool) -> list[Any]:
        shape = [self.batch, self.channels, *self.size]
        shape = shape if static else [self.steps, *shape]
        spatial, temporal = self.tensor(*shape), self.tensor(self.batch, self.steps)
        # Scores of 0 would make gates of 1/2, give or take a rounding, which a second neuron compares with 1/2.
        return [self.tensor(*shape), spatial + 0.0625, temporal + 0.0625, self.spec]

    def _gac_encode(self) -> Call:
        return self._gate(True), {}

    def _gated_lif(self) -> Call:
        return self._gate(False), {}

    def _gac_fire(self) -> Call:
        if self.triton and self.dtype == torch.bfloat16:
            self.dtype = (
                torch.float16
            )  # Triton's interpreter cuts to bfloat16, and a second neuron compares what is left
        return [*self._gate(self.random.random() < 0.5), self.maybe(torch.int8)], {}

    def _pad_frames(self) -> Call:
        sizes = [self.random.randrange(4) for _ in range(2)]
        return [self.folded(), *sizes, self.random.random() < 0.5], {}

    def _pool_frames(self) -> Call:
        return [self.folded()], {}

    def _firing_rate(self) -> Call:
        dtype = self.random.choice([None, *self.dtypes])
        return [self.folded(spikes=True, dtype=self.maybe(torch.int8)), self.steps, dtype], {}

    def _count_spikes(self) -> Call:
        x = self.folded(scale=1, dtype=self.random.choice([self.dtype, torch.float32]))
        total = torch.zeros(self.steps, self.channels, *self.size)
        return [x, self.steps, total, torch.zeros((), dtype=torch.bool)], {}

    def _pack_spikes(self) -> Call:
        return [self.folded(spikes=True), self.steps], {}

    def _unpack_spikes(self) -> Call:
        count = -(-self.steps // 8) * self.batch
        bits = torch.randint(256, (count, self.channels, *self.size), generator=self.generator, dtype=torch.uint8)
        return [bits, self.steps, self.random.choice([*self.dtypes, torch.int8])], {}

    def _packed_conv2d(self) -> Call:
        spikes = self.folded(spikes=True)
        weight = self.tensor(2 * self.channels, 1 if self.channels > 3 else self.channels, 1, 1, scale=3)
        groups = self.channels if self.channels > 3 else 1
        pairs = [(self.random.choice([1, 2]), 1), (self.random.randrange(2), 1), (1, 1)]
        return [spikes, gac_kernels.pack_spikes(spikes, self.steps), weight, self.steps, *pairs, groups], {}

    def _int8_conv2d(self) -> Call:
        spikes = self.folded(spikes=True)
        weight = self.tensor(2 * self.channels, self.channels, 3, 3)
        bits = self.maybe(gac_kernels.pack_spikes(spikes, self.steps))
        steps = {} if bits is None else {"bits": bits, "num_steps": self.steps}
        return [spikes, weight, self.random.choice([1, 2])], steps

    def _batch_stats(self) -> Call:
        self.batch += 2
        running = [self.tensor(self.channels, dtype=torch.float32), self.powers(2 * self.channels)[::2]]
        running[0] = running[0].clone() if running[0].stride(0) == 0 else running[0]
        running = running if self.random.random() < 0.5 else [None, None]
        return [self.folded(), *running, 0.25, self.maybe(torch.tensor(3))], {}

    def _norm_lif(self) -> Call:
        vectors = [self.tensor(self.channels, dtype=torch.float32, scale=12) for _ in range(6)]
        spread = [self.powers(self.channels).expand(self.channels), self.powers(2 * self.channels)[::2]]
        affine = self.random.random() < 0.7
        keywords: dict[str, Any] = {"eps": 0.0, "return_membrane": self.random.random() < 0.5}
        keywords |= {"return_bits": self.random.random() < 0.3, "residual": self.maybe(self.folded())}
        if affine:
            keywords |= {"weight": vectors[0], "bias": vectors[1]}
        if keywords["residual"] is not None and self.random.random() < 0.5:
            of_residual = vectors[2:4] if affine else [None, None]
            keywords["residual_norm"] = ResidualNorm(vectors[4], spread[0], *of_residual, 0.0)
        return [self.folded(), vectors[5], spread[1], self.steps, self.spec], keywords

    def _convolution(self, of_spikes: bool) -> Call:
        stride, out = self.random.choice([1, 2]), self.random.choice([1, 3, 8])
        integer = torch.int8 if of_spikes else self.dtype
        wide = torch.float64 if self.dtype == torch.float64 and not of_spikes else torch.float32
        x = self.folded(spikes=True, dtype=integer)
        weight = self.tensor(out, self.channels, 3, 3, dtype=integer, scale=8)
        vectors = [self.tensor(out, dtype=wide) for _ in range(2 if of_spikes else 1)]
        size = [(n - 1) // stride + 1 for n in self.size]
        dtype = self.random.choice([torch.float32, torch.int8]) if of_spikes else self.dtype
        residual = self.maybe(self.tensor(self.steps * self.batch, out, *size, dtype=dtype))
        return [x, weight, *vectors, self.steps, self.spec], {"stride": stride, "residual": residual}

    def _conv_lif(self) -> Call:
        return self._convolution(False)

    def _spike_conv(self) -> Call:
        return self._convolution(True)


def double(value: Any) -> Any:
    """``value`` with floating tensors in float64."""
    if isinstance(value, ResidualNorm):
        return ResidualNorm(*map(double, value))
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def placed(value: Any, device: str) -> Any:
    """``value`` with its tensors on a device, in memory that is strided or expanded as it was."""
    if isinstance(value, ResidualNorm):
        return ResidualNorm(*(placed(field, device) for field in value))
    if not isinstance(value, Tensor) or value.device.type == device:
        return value
    memory = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage()).to(device)
    return memory.as_strided(value.shape, value.stride(), value.storage_offset())


def copied(value: Any) -> Any:
    """A copy with the same strides of each tensor that the op writes into."""
    return value.clone() if isinstance(value, Tensor) else value


def tensors_of(value: Any) -> list[Tensor]:
    values = value if isinstance(value, (tuple, list)) else [] if value is None else [value]
    return [v for v in values if isinstance(v, Tensor)]


def differ(mine: Tensor, theirs: Tensor, dtype: torch.dtype, summed: float = 0.0) -> str:
    """What is wrong with a result, empty if nothing is.

    A gradient that is a sum over ``summed`` elements, each rounded to 16 bits, may cancel to almost nothing. Its error
    is then that of its terms, taken as 1/2 each, and not a share of what is left of them.
    """
    if mine.shape != theirs.shape:
        return f"shape {tuple(mine.shape)} instead of {tuple(theirs.shape)}"
    tolerance = max(TOLERANCES[d] for d in (dtype, mine.dtype) if d in TOLERANCES) if dtype in TOLERANCES else 1e-5
    a, b = mine.double(), theirs.double()
    least = max(0.05, 0.5 * summed**0.5 if dtype.itemsize == 2 else 0.0) * b.numel() ** 0.5
    error = (a - b).norm().item() / max(b.norm().item(), least) if a.numel() else 0.0
    return "" if error <= 2 * tolerance else f"relative error {error:.1e} in {mine.dtype}"


def good(op: str, seed: int, triton: bool = False) -> str:
    """Make one good call, forward and, where the op has one, backward; what is wrong with it, empty if nothing is."""
    maker = Maker(seed, triton)
    args, keywords = maker.make(op)
    if triton and torch.cuda.is_available():
        args = [placed(value, "cuda") for value in args]
        keywords = {name: placed(value, "cuda") for name, value in keywords.items()}
    function, reference = (getattr(gac_kernels, name) for name in (op, f"{op}_reference"))
    in_place = [copied(value) for value in args] if op in ("batch_stats", "count_spikes") else args
    # Where a current or gate is rounded on the way, the reference has to round it too.
    rounded = keywords.get("return_membrane") or op == "gac_fire"
    up = (lambda value: value) if rounded and maker.dtype.itemsize == 2 else double
    learns = op not in ("batch_stats", "count_spikes", "conv_lif", "spike_conv", "integer_lif", "pack_spikes")
    leaves = [
        value.requires_grad_()
        for value in (*(args[:1] if op == "norm_lif" else args), *keywords.values())
        if learns and isinstance(value, Tensor) and value.is_floating_point() and value.is_leaf
    ]
    outputs = function(*args, **keywords)
    exact = [up(value) for value in in_place]
    if in_place is not args:
        exact = [value.clone() if isinstance(value, Tensor) and value is given else value for value, given in
                 zip(exact, in_place, strict=True)]  # fmt: skip
    twins = reference(*exact, **{name: up(value) for name, value in keywords.items()})
    mine, theirs = tensors_of(outputs), tensors_of(twins)
    if in_place is not args:
        mine, theirs = mine + tensors_of(args[1:]), theirs + tensors_of(exact[1:])
    for a, b in zip(mine, theirs, strict=True):
        if wrong := differ(a, b, maker.dtype):
            return wrong
    pairs = [(a, b) for a, b in zip(mine, theirs, strict=True) if a.requires_grad]
    if not pairs or not leaves or op == "int8_conv2d":  # whose gradients are rounded: its tests have their reference
        return ""
    towards = [torch.randint(-8, 9, a.shape, generator=maker.generator).to(a) / 8 for a, _ in pairs]
    actual = torch.autograd.grad([a for a, _ in pairs], leaves, towards, allow_unused=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        towards = [toward.to(b.dtype) for toward, (_, b) in zip(towards, pairs, strict=True)]
    coarsest = max((y.dtype for pair in pairs for y in pair), key=TOLERANCES.__getitem__)
    coarsest = max(coarsest, maker.dtype, key=TOLERANCES.__getitem__)
    wanted = torch.autograd.grad([b for _, b in pairs], leaves, towards, allow_unused=True)
    largest = max(leaf.numel() for leaf in leaves)
    for a, b in zip(actual, wanted, strict=True):
        summed = largest / b.numel() if b is not None and 0 < b.numel() < largest else 0.0
        if a is not None and b is not None and (wrong := differ(a, b, coarsest, summed)):
            return f"gradient: {wrong}"
        if (a is None or not a.any()) != (b is None or not b.any()):
            return f"gradient: {a is None and 'none'} instead of {b is None and 'none'}"
    return ""


def nested(_: Any) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(2, 2), torch.ones(3, 2)])


TENSOR_FAULTS: dict[str, Callable[[Tensor], Any]] = {
    "none": lambda x: None,
    "number": lambda x: 3,
    "text": lambda x: "x" * 1000,
    "list": lambda x: [1.0] * 1000,
    "array": lambda x: x.detach().to(torch.float32).numpy(),
    "sparse": lambda x: x.to_sparse(),
    "nested": nested,
    "0-d": lambda x: x.new_zeros(()),
    "more axes": lambda x: x[None],
    "no channels": lambda x: x.narrow(min(1, x.dim() - 1), 0, 0) if x.dim() else [],
    "one longer": lambda x: torch.cat([x, x.narrow(-1, 0, 1)], -1) if x.dim() and x.shape[-1] else [],
    "complex": lambda x: x.to(torch.complex64),
    "int64": lambda x: x.to(torch.int64),
    "bool": lambda x: x.to(torch.bool),
    "meta": lambda x: x.to("meta"),
}
NUMBER_FAULTS = [None, -1, 0, True, 1.5, "a", float("nan"), float("inf"), 10**12, 1j, [1] * 1000, (1, 2, 3), object()]
SPEC_FAULTS = [None, "cifar", 1.0, torch.float32, torch.ones(3), {"threshold": 1.0}]


def corrupt(maker: Maker, value: Any) -> tuple[str, Any]:
    """Kind of fault and the faulty value in the place of a good one."""
    if isinstance(value, Tensor):
        kind = maker.random.choice(list(TENSOR_FAULTS))
        return kind, TENSOR_FAULTS[kind](value)
    faults = SPEC_FAULTS if isinstance(value, (LIFSpec, ResidualNorm, torch.dtype)) else NUMBER_FAULTS
    fault = maker.random.choice(faults)
    return f"{type(value).__name__} as {str(fault)[:12]}", fault


def bad(op: str, seed: int) -> tuple[str, str]:
    """Make one call with one faulty argument.

    Returns:
        The kind of fault, and what is wrong with the answer: another error than a sentence, a tensor that was written,
        or a result that is not the reference's. A call that is right after all has to give what the reference gives.
    """
    maker = Maker(seed)
    maker.batch = max(1, maker.batch)
    args, keywords = maker.make(op)
    places: list[Any] = [i for i, value in enumerate(args) if value is not None]
    places += [name for name, value in keywords.items() if value is not None]
    place = maker.random.choice(places)
    container: Any = args if isinstance(place, int) else keywords
    kind, container[place] = corrupt(maker, container[place])
    kept = [value.clone() if type(value) is Tensor and value.layout is torch.strided and not value.is_nested else None
            for value in args]  # fmt: skip
    try:
        outputs = getattr(gac_kernels, op)(*args, **keywords)
    except (ValueError, TypeError, NotImplementedError) as error:
        text = str(error)
        if len(text) >= 500 or "expected" not in text or "got" not in text or ": " not in text:
            return kind, f"{place}: {type(error).__name__}: {text[:200]}"
        for before, after in zip(kept, args, strict=True):
            if before is not None and before.device.type != "meta" and not torch.equal(before, after):
                return kind, f"{place}: written before it was refused"
        return kind, ""
    except Exception as error:
        return kind, f"{place}: {type(error).__name__}: {str(error)[:200]}"
    if any(tensor.is_meta for tensor in (*tensors_of(outputs), *tensors_of(args))):
        return "right after all", ""
    try:
        exact = [value.clone() if before is not None else value for value, before in zip(args, kept, strict=True)]
        exact = [before if op in ("batch_stats", "count_spikes") and before is not None else double(value)
                 for value, before in zip(exact, kept, strict=True)]  # fmt: skip
        theirs = tensors_of(
            getattr(gac_kernels, f"{op}_reference")(*exact, **{name: double(value) for name, value in keywords.items()})
        )
    except Exception as error:
        return kind, f"{place}: accepted, the reference says {type(error).__name__}: {str(error)[:100]}"
    wrong = [differ(a, b, maker.dtype) for a, b in zip(tensors_of(outputs), theirs, strict=True)]
    return "right after all", "; ".join(f"{place} {kind}: accepted, {text}" for text in wrong if text)


def run(count_good: int, count_bad: int, triton: int, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """The number of calls of each kind, and the failures.

    Args:
        count_good: Good calls.
        count_bad: Bad calls.
        triton: Every so manieth round of good calls runs in Triton; 0 for none.
        seed: Of the first call.
    """
    counts: Counter[str] = Counter()
    failures = []
    for i in range(count_good):
        op = OPS[i % len(OPS)]
        in_triton = triton > 0 and (i // len(OPS)) % triton == 0
        with use_backend("triton" if in_triton else "eager"):
            try:
                wrong = good(op, seed + i, in_triton)
            except Exception as error:
                wrong = f"{type(error).__name__}: {str(error)[:300]}"
        counts["good, Triton" if in_triton else "good, eager"] += 1
        failures += [f"good {op} {seed + i} {'triton' if in_triton else 'eager'}: {wrong}"] if wrong else []
    for i in range(count_bad):
        op = OPS[i % len(OPS)]
        with use_backend("eager"):
            kind, wrong = bad(op, seed + i)
        counts[f"bad: {kind}"] += 1
        failures += [f"bad {op} {seed + i} {kind}: {wrong}"] if wrong else []
    return counts, failures


def main() -> None:
    """Run as the command line says; exit with 1 where something failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--good", type=int, default=2400)
    parser.add_argument("--bad", type=int, default=1200)
    parser.add_argument("--triton", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts, failures = run(options.good, options.bad, options.triton, options.seed)
    lines = [f"{count:6} {kind}" for kind, count in sorted(counts.items())]
    sys.stdout.write("\n".join([*lines, *failures, f"{len(failures)} failures", ""]))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
