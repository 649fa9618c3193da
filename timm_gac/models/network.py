"""The spiking ResNet, with gated attention coding (GAC) or direct coding, in timm's model contract.

Activations inside are time-folded: ``(T*B, C, H, W)``, row ``t*B + b`` being sample b at step t.

Source: Qiu et al., "Gated Attention Coding for Training High-performance and Efficient Spiking Neural Networks", AAAI
2024 (arXiv 2308.06582).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates, create_classifier
from timm.models import create_model
from torch import Tensor, nn

from gac_kernels import IMAGENET, LIFSpec
from gac_kernels.checks import check_finite, check_flags
from gac_kernels.common.tiles import is_channels_last
from gac_kernels.eight_bit.norm import Spikes, to_spikes
from gac_kernels.spikes.firing_rate import marked_firing_rate

from ..layers import eight_bit
from ..layers.batch_statistics import call_norm
from ..layers.checks import SetOnce, fixed_num_steps, log_called, may_skip
from ..layers.convolution import Conv2d, SpikeConv2d, is_plain_3x3
from ..layers.encoder import DirectCoding, GatedAttentionCoding
from ..layers.learned import NEURONS, fit_learned_values
from ..layers.lif import LIF
from ..layers.neuron import BatchNormLIF
from ..layers.neuron_layer import NeuronLayer
from ..layers.noise import adds_noise
from ..runtime.first_call import compiled_first
from ..runtime.weight_gradients import overlap_enabled, with_cast_weights
from .arguments import block_class, check_model_args, lif_spec, with_neuron
from .blocks import STAGES, MSBlock, SpikingBlock, Stage
from .checkpoint import checkpoint_filter_fn as checkpoint_filter_fn  # timm expects it beside the model's class
from .checkpoint import unpack_int8_convs
from .folding import FiringRate, fold_time, not_finite_marked, stem_variance, unfold_time
from .timm_network import TimmNetwork

_ENCODER_FORWARDS = (GatedAttentionCoding.forward,)
_RATE_FORWARDS = (FiringRate.forward,)


class SpikingResNet(TimmNetwork):
    """Spiking ResNet whose features are firing rates.

    Shape:
        - input: images ``(B, C, H, W)``, whose stem runs once for all steps, or event frames ``(B, T, C, H, W)``
        - `forward`: logits ``(B, num_classes)``; `forward_steps`: logits of each step ``(B, T, num_classes)``
        - `forward_features`: firing rates ``(B, C', H', W')``, the mean of the spikes over time

    Args:
        block: Block class, `MSBlock` (membrane shortcut) or `SpikingBlock` (plain), or its name.
        layers: Number of blocks of each stage, 3 or 4 stages.
        channels: Channels of each stage.
        strides: Stride of each stage.
        stem_width: Channels of the stem.
        stem_kernel: Kernel size of the stem, 7 (stride 2) or 3 (stride 1).
        encoder: Input encoder, ``gac`` or ``direct``.
        spec: Neuron model: threshold, decay, reset and surrogate gradient; or its fields by name.
        num_steps: Number of time steps T.
        num_classes: Number of classes; 0 for pooled features instead of logits.
        in_chans: Channels of the input.
        global_pool: Pooling before the classifier, as in timm; '' for none.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0; a sample keeps its mask over time.
        scaled_init: Initialise for the ImageNet dialect: convolutions kaiming-normal (fan-out), batch norm weights at
            the threshold and 0 at the end of each residual branch. Otherwise PyTorch's defaults.
        int8_convs: Train the 3x3 convolutions of spikes in 8 bits, see `set_int8_convs`.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        gate: Which attention the gate of ``gac`` has, see `GatedAttentionCoding`.
        neuron: ``lif`` for the decay and threshold of ``spec``; ``plif`` to learn one of each a layer, beginning with
            these, ``plif_channel`` one of each a channel. Weights of one kind load into the others, with a line in the
            log where something is lost or kept: of ``plif_channel`` into ``plif`` the mean over channels. Or the name
            of another neuron (``neuron`` of `LIFSpec`): ``ternary``, ``integer``, ``adaptive``, or one of your own.

    Raises:
        ValueError: An argument is out of range.
    """

    inference_only = False  # set where batch norms are folded away
    int8_convs = False  # see set_int8_convs
    num_steps = fixed_num_steps()
    spec: Any = SetOnce("create the network with this spec; its neurons have specs of their own")
    # Set by name in the constructor.
    layer1: Stage
    layer2: Stage
    layer3: Stage
    layer4: Stage

    # Kinds of neuron whose work the encoder's op can do, and the dtype of their spikes, None for the encoder's.
    _first_neurons: ClassVar[dict[type[nn.Module], torch.dtype | None]] = {LIF: None}

    def __init__(
        self,
        block: type[MSBlock] | type[SpikingBlock] | str = MSBlock,
        layers: tuple[int, ...] = (2, 2, 2, 2),
        channels: tuple[int, ...] = (64, 128, 256, 512),
        strides: tuple[int, ...] = (2, 2, 2, 2),
        stem_width: int = 64,
        stem_kernel: int = 7,
        encoder: str = "gac",
        spec: LIFSpec | Mapping[str, Any] = IMAGENET,
        num_steps: int = 4,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        scaled_init: bool = True,
        int8_convs: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        gate: str = "full",
        neuron: str = "lif",
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        block_type: Any = block_class(block)
        spec = lif_spec(spec)
        check_model_args({"neuron": neuron})
        spec, neuron = with_neuron(spec, neuron)
        kept = dict(  # what no other attribute holds, see `model_args`
            channels=channels,
            strides=strides,
            stem_width=stem_width,
            stem_kernel=stem_kernel,
            encoder=encoder,
            gate=gate,
            drop_path_rate=drop_path_rate,
            scaled_init=scaled_init,
            neuron=neuron,
        )
        check_model_args(
            kept
            | dict(
                layers=layers,
                num_steps=num_steps,
                num_classes=num_classes,
                in_chans=in_chans,
                global_pool=global_pool or "",
                drop_rate=drop_rate,
                int8_convs=int8_convs,
            )
        )
        if not len(layers) == len(channels) == len(strides):
            raise ValueError(
                f"expected layers, channels and strides of one length, 3 or 4, got {layers}, {channels}, {strides}: "
                "give one entry a stage"
            )
        self._args: dict[str, Any] = kept | dict(
            block=block_type.__name__, channels=list(channels), strides=list(strides)
        )
        self.num_steps = num_steps
        self.spec = spec
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.scaled_init = scaled_init

        stride = 2 if stem_kernel > 3 else 1
        self.conv1 = Conv2d(
            in_chans,
            stem_width,
            kernel_size=stem_kernel,
            stride=stride,
            padding=stem_kernel // 2,
            bias=False,
            **dd,
        )
        self.bn1 = nn.BatchNorm2d(stem_width, **dd)
        gated = encoder == "gac"
        learnable = NEURONS.get(neuron)
        learning: dict[str, Any] = {"learnable": learnable} if learnable else {}  # a block of one's own may not take it
        self.encoder = (
            GatedAttentionCoding(stem_width, num_steps, spec, gate=gate, **dd, **learning)
            if gated
            else DirectCoding(num_steps)
        )
        # Blocks with membrane shortcuts take LIF(x) beside x; within the net the block before has computed it.
        self.lif = (
            LIF(spec, num_steps, channels=stem_width, **dd, **learning) if block_type is MSBlock else nn.Identity()
        )
        self.feature_info = [dict(num_chs=stem_width, reduction=stride, module="encoder")]

        rates = calculate_drop_path_rates(drop_path_rate, list(layers), stagewise=True)
        width, reduction = stem_width, stride
        for i, name in enumerate(STAGES):
            blocks = []
            for j in range(layers[i] if i < len(layers) else 0):  # a missing fourth stage is an empty one
                blocks.append(
                    block_type(
                        width,
                        channels[i],
                        stride=strides[i] if j == 0 else 1,
                        num_steps=num_steps,
                        spec=spec,
                        drop_path=rates[i][j],
                        **dd,
                        **learning,
                    )
                )
                width = channels[i]
            self.add_module(name, Stage(*blocks))
            if blocks:
                reduction *= strides[i]
                self.feature_info.append(dict(num_chs=width, reduction=reduction, module=name))

        self.num_features = width
        self.rate = FiringRate(num_steps)
        self.global_pool, self.fc = create_classifier(width, num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = width * self.global_pool.feat_mult()
        if scaled_init:
            self.init_weights()
        if int8_convs:
            self.set_int8_convs()

    def init_weights(self) -> None:
        """Initialise as the ImageNet models are: see ``scaled_init``."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, (nn.BatchNorm2d, BatchNormLIF)) and module.affine:
                nn.init.constant_(module.weight, self.spec.threshold)
        for module in self.modules():
            if isinstance(module, (MSBlock, SpikingBlock)):
                module.zero_init_last()

    def model_args(self) -> dict[str, Any]:
        """All arguments that rebuild this network as it is now, as JSON holds them: ``SpikingResNet(**arguments)``.

        Device and dtype are not among them.

        Raises:
            ValueError: The network is folded, some neurons have another spec than it, or it was pruned to its encoder
                alone, so no arguments rebuild it.
        """
        if self.inference_only and not hasattr(self, "quantization"):
            raise ValueError("expected a network with batch norms, got one that is folded: use it as it was before")
        modules = [module for module in self.modules() if getattr(module, "neuron", None) is None]  # learned, rounded
        specs = {module.spec for module in modules if isinstance(getattr(module, "spec", None), LIFSpec)}
        if len(specs) > 1:
            raise ValueError(
                f"expected neurons of one spec, got {len(specs)} different ones: build the network with its spec"
            )
        stages = [len(getattr(self, name)) for name in STAGES[: len(self._args["channels"])]]
        if not any(stages) and self._args["block"] == "MSBlock" and not isinstance(self.lif, LIF):
            raise ValueError(
                "expected a network with a stage, got one that is pruned to its encoder, which no arguments make: keep "
                "its first stage too"
            )
        return self._args | dict(
            layers=stages,
            spec={name: value for name, value in dataclasses.asdict(self.spec).items() if name != "neuron"},
            num_steps=self.num_steps,
            num_classes=self.num_classes,
            in_chans=self.in_chans,
            global_pool=self.global_pool.pool_type,
            drop_rate=self.drop_rate,
            int8_convs=self.int8_convs,
        )

    def changed_args(self) -> dict[str, Any]:
        """Those of `model_args` in which this network differs from its registered architecture.

        With ``timm.create_model(architecture, **arguments)`` they rebuild it, the architecture being that of its
        ``pretrained_cfg``.
        """
        own = create_model(self.pretrained_cfg["architecture"], device="meta").model_args()
        return {name: value for name, value in self.model_args().items() if value != own[name]}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of any module; weights of networks with other neurons (``neuron``) load too, with a line in the log.

        So does a stored file that holds the integers of a network trained in 8 bits.
        """
        state = fit_learned_values(self, state_dict)
        if any(getattr(value, "dtype", None) == torch.int8 for value in state.values()) and not self.inference_only:
            state = unpack_int8_convs(state, self.state_dict().keys())
        return super().load_state_dict(state, strict=strict, assign=assign)

    def set_spike_packing(self, enable: bool = True) -> None:
        """Keep spikes of blocks as bits for the backward pass of the convolutions that read them.

        Less memory in training for the same gradients, to the bit, and some time to unpack them; of no effect where
        gradients are disabled. In networks with plain blocks the identity shortcuts still keep spikes as they are.

        Raises:
            ValueError: Spikes of the network's neuron are not 0 or 1, or ``enable`` is not True or False.
        """
        check_flags(enable=enable)
        if enable:
            self.spec.refuse_spikes("packed bits", "ternary", "levels")
        blocks = [module for module in self.modules() if isinstance(module, (MSBlock, SpikingBlock))]
        for block in blocks:
            block.pack_hidden, block.pack_output = enable, enable and block is not blocks[-1]

    def set_int8_convs(self, enable: bool = True) -> None:
        """Train the 3x3 convolutions of spikes in 8 bits: int8 weights forward, float8 gradients backward.

        `gac_kernels.int8_conv2d` says what is computed, in evaluation too: what is trained is what `quantize` returns.
        Parameters and state_dict stay as they are, the weights that learn. In a network with plain blocks the first
        convolution, whose input is real, is left alone.

        Raises:
            ValueError: The network is folded or quantised, has another convolution in the place of one of these, or
                another neuron than ``lif``, for which there is no 8-bit inference; or ``enable`` is not True or False.
        """
        check_flags(enable=enable)
        if enable:
            self.spec.refuse_others("8-bit convolutions")
        if self.inference_only:
            raise ValueError("expected a network that trains, got one that is folded or quantised: create it anew")
        blocks = [module for module in self.modules() if isinstance(module, (MSBlock, SpikingBlock))]
        convs: list[Any] = [conv for block in blocks for conv in (block.conv1, block.conv2)]
        convs = convs[1:] if blocks and isinstance(blocks[0], SpikingBlock) else convs
        for conv in convs:
            if not isinstance(conv, SpikeConv2d) or not is_plain_3x3(conv) or conv.bias is not None:
                kind = " ".join(str(conv).split())[:80]
                raise ValueError(f"expected 3x3 SpikeConv2d without bias in all blocks, got {kind}: put it back")
        for conv in convs:
            conv.int8 = enable
        self.int8_convs = enable

    def set_current_noise(self, share: float) -> None:
        """Add Gaussian noise to the input current of all neurons, in training only; 0 for none.

        The unit is the threshold: rounding flips a spike where it moves a membrane across the threshold, and what a
        batch norm puts out is measured in thresholds too. The noise is independent in every element and time step.
        A batch norm's statistics, the encoder's gate and the membrane that a shortcut carries on are of values without
        it, as in evaluation. Packed spikes work; 8-bit convolutions then run without their kernels.

        Args:
            share: Standard deviation of the noise as a share of a neuron's threshold, of a learned one as it is now.

        Raises:
            ValueError: ``share`` is no finite number >= 0; or, where it is not 0, the network is folded or quantised,
                or has other neurons than this package's.
        """
        check_finite("share", share, 0.0)
        layers: list[Any] = [module for module in self.modules() if isinstance(module, (LIF, GatedAttentionCoding))]
        if share and self.inference_only:
            raise ValueError("expected a network that trains, got one that is folded or quantised: create it anew")
        for module in self.modules() if share else ():
            neuron = module.lif if isinstance(module, BatchNormLIF) else module
            other = isinstance(neuron, NeuronLayer) or neuron is not module
            if other and not isinstance(neuron, (LIF, GatedAttentionCoding)):
                name = type(neuron).__name__
                raise ValueError(
                    f"expected LIF in the place of all neurons for noise on currents, got {name}: put it back"
                )
        for layer in layers:
            layer.current_noise = float(share)

    def _stem(self, x: Tensor) -> Tensor:
        """What the encoder takes: ``(B, C, H, W)`` for images, ``(T, B, C, H, W)`` for event frames."""
        if self.training and self.inference_only and torch.is_grad_enabled() and isinstance(x, Tensor):  # none under fx
            raise ValueError(
                "expected a network with batch norms to train, got one that is folded or quantised: create it anew and "
                "load its weights, or call eval()"
            )
        stem = call_norm(self.bn1, self.conv1(fold_time(x, self.num_steps)))
        return unfold_time(stem, x, self.num_steps)

    def _encode(self, x: Tensor) -> Tensor:
        """The encoder's output, time-folded: ``(T*B, C, H, W)``."""
        coded = self.encoder(self._stem(x))
        if isinstance(coded, Tensor) and coded.shape[0] != self.num_steps:  # under fx it is none
            raise ValueError(
                f"expected an encoder of {self.num_steps} time steps, got {coded.shape[0]}: create both with one "
                "num_steps"
            )
        return coded.flatten(0, 1)

    def _fires_in_encoder(self, x: Tensor) -> bool:
        """Whether the encoder may do the first neuron's work.

        Not where somebody watches one of the two or noise is added, nor under fx, for which both are leaves.
        """
        encoder, neuron = self.encoder, self.lif
        if adds_noise(encoder) or adds_noise(neuron):
            return False
        if not (
            isinstance(x, Tensor)
            and isinstance(encoder, GatedAttentionCoding)
            and type(neuron) in self._first_neurons
            and encoder.spec == neuron.spec
            and encoder.num_steps == neuron.num_steps == self.num_steps
        ):
            return False
        neuron_forwards = (type(neuron).forward,)
        if may_skip(encoder, _ENCODER_FORWARDS) and may_skip(neuron, neuron_forwards):
            return True
        log_called(encoder, _ENCODER_FORWARDS)
        log_called(neuron, neuron_forwards)
        return False

    def _encode_and_fire(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's output and the first neuron's spikes in one pass, both time-folded."""
        encoder: Any = self.encoder
        membrane, spikes = encoder.encode_and_fire(self._stem(x), self._first_neurons[type(self.lif)], self.lif)
        return membrane.flatten(0, 1), spikes.flatten(0, 1)

    def _rate(self, spikes: Tensor) -> Tensor:
        """Mean over time: ``(T*B, C, H, W)`` -> ``(B, C, H, W)``."""
        dtype = self._rate_dtype()
        return self.rate(spikes) if dtype is None else self.rate(spikes, dtype)

    def _marks_rate(self, spikes: Tensor) -> bool:
        """Whether one kernel may do the rate's work and mark it; it has no gradient."""
        if torch.is_grad_enabled() or not isinstance(spikes, Tensor):  # under fx it is none
            return False
        if not may_skip(self.rate, _RATE_FORWARDS):
            log_called(self.rate, _RATE_FORWARDS)
            return False
        return True

    def _rate_dtype(self) -> torch.dtype | None:
        """Dtype of firing rates; None for that of the spikes."""
        return None

    def _forward_spikes(self, x: Tensor) -> Tensor:
        """Spikes of the last stage, time-folded: ``(T*B, C', H', W')``."""
        with with_cast_weights(self, Conv2d, x) if overlap_enabled(self) else nullcontext():
            if self._fires_in_encoder(x):
                return self._run_stages(*self._encode_and_fire(x))
            return self._run_stages(self._encode(x))

    def _run_stages(self, membrane: Tensor, spikes: Tensor | None = None) -> Tensor:
        """Spikes of the last stage, from the encoder's output and the first neuron's spikes where they are computed."""
        if spikes is None:
            spikes = self.lif(membrane)
        if self.int8_convs and self._takes_8_bits(membrane, spikes):
            return self._run_in_8_bits(membrane, spikes)
        membrane, spikes, bits = self.layer1(membrane, spikes, None)
        membrane, spikes, bits = self.layer2(membrane, spikes, bits)
        membrane, spikes, bits = self.layer3(membrane, spikes, bits)
        membrane, spikes, bits = self.layer4(membrane, spikes, bits)
        return spikes

    def _takes_8_bits(self, membrane: Tensor, spikes: Tensor) -> bool:
        """Whether the blocks can train with spikes and gradients of one byte; what stands in the way is logged once."""
        if not (self.training and torch.is_grad_enabled() and isinstance(spikes, Tensor)):
            return False  # also under fx
        if torch.compiler.is_compiling() or spikes.numel() < 2 * spikes.shape[1]:
            return False
        device, dtype = spikes.device.type, spikes.dtype
        computing = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
        reason = eight_bit.why_not(spikes.device, dtype, self.num_steps)
        if not reason and not (dtype == membrane.dtype == computing):
            reason = f"the encoder returns {membrane.dtype} and {dtype}, and convolutions compute in {computing}"
        if not reason and not all(is_channels_last(x) for x in (membrane, spikes)):
            reason = "the network is not in channels-last memory"
        for block in self._blocks() if not reason else ():
            if not isinstance(block, MSBlock) or type(block).forward is not MSBlock.forward:
                reason = "blocks are no MSBlocks"
            else:
                reason = reason or block.why_not_in_8_bits()
        if not reason and any(getattr(self, name).grad_checkpointing for name in STAGES):
            reason = "blocks are recomputed in the backward pass"
        if reason:
            eight_bit.say(reason)
        return not reason

    def _blocks(self) -> list[Any]:
        return [block for name in STAGES for block in getattr(self, name)]

    def _run_in_8_bits(self, membrane: Tensor, spikes: Tensor) -> Tensor:
        """What `_run_stages` computes, where `_takes_8_bits`."""
        blocks, edge = self._blocks(), spikes
        small: Spikes | None = to_spikes(spikes.detach(), self.num_steps)
        for block in blocks:
            assert small is not None
            membrane, edge, small = block.in_8_bits(membrane, edge, small, block is blocks[-1])
        return edge

    def forward_features(self, x: Tensor) -> Tensor:
        """Firing rates of the last stage, ``(B, C', H', W')`` in [0, 1]."""
        return compiled_first(self, self._features, x)

    def _features(self, x: Tensor) -> Tensor:
        spikes = self._forward_spikes(x)
        if self._marks_rate(spikes):
            return marked_firing_rate(spikes, self.num_steps, x, stem_variance(self.bn1), self._rate_dtype())
        return not_finite_marked(self._rate(spikes), x, self.bn1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits, or with ``pre_logits`` what the classifier would see, from features ``(N, C', H', W')``."""
        x = self.global_pool(x)
        if self.drop_rate > 0.0:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, num_classes)`` from images ``(B, C, H, W)`` or event frames ``(B, T, C, H, W)``."""
        return self.forward_head(self.forward_features(x))

    def _logits(self, spikes: Tensor) -> Tensor:
        """Logits of each step, time-folded ``(T*B, num_classes)``."""
        return self.forward_head(spikes)

    def forward_steps(self, x: Tensor) -> Tensor:
        """Logits of each time step, ``(B, T, num_classes)``.

        The classifier is linear, so with average pooling and no dropout their mean over time equals `forward`.
        """
        return compiled_first(self, self._steps, x)

    def _steps(self, x: Tensor) -> Tensor:
        logits = self._logits(self._forward_spikes(x))
        logits = logits.unflatten(0, [self.num_steps, logits.shape[0] // self.num_steps]).transpose(0, 1)
        return not_finite_marked(logits, x, self.bn1)
