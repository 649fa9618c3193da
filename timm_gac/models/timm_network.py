"""What timm asks of a network beside its forward pass: groups of parameters, a classifier to replace, feature maps."""

from __future__ import annotations

from typing import Any

from timm.layers import create_classifier, get_device_dtype
from timm.models._features import feature_take_indices  # timm offers it to model files under this name only
from torch import Tensor, nn

from .arguments import check_model_args
from .blocks import STAGES, Stage
from .folding import not_finite_marked


class TimmNetwork(nn.Module):
    """Base of `SpikingResNet`, with timm's methods; what they use the network itself sets."""

    pretrained_cfg: dict[str, Any]  # set by timm
    num_classes: int
    num_steps: Any
    num_features: int
    head_hidden_size: int
    feature_info: list[dict[str, Any]]
    encoder: Any
    lif: Any
    global_pool: Any
    fc: Any
    _args: dict[str, Any]

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Patterns that group parameters by stage (coarse) or by block, for layer-wise learning rates."""
        return dict(stem=r"^(?:conv1|bn1|encoder)\.", blocks=r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)")

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay: the encoder's attention, learned decays and thresholds.

        They come beside timm's, which are those of one axis.

        The gate is the sigmoid of a product of two scores, and each scales the other's gradient. Decay takes both to
        0, where both gradients vanish: at 5e-4 all of these weights were below 1e-5 after 165 epochs.
        """
        gate = {f"encoder.{name}" for name, _ in self.encoder.named_parameters()}
        return gate | {name for name, _ in self.named_parameters() if ".learned." in name}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        for name in STAGES:
            getattr(self, name).grad_checkpointing = enable

    def get_classifier(self, name_only: bool = False) -> nn.Module | str:
        """The classifier, or its name."""
        return "fc" if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, keeping the pooling where ``global_pool`` is None; names of classes are forgotten."""
        check_model_args(dict(num_classes=num_classes, channels=[*self._args["channels"][:-1], self.num_features]))
        dd = get_device_dtype(self)
        self.num_classes = num_classes = int(num_classes)  # of a NumPy number, which no config.json holds
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=pool_type, **dd)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.fc.train(self.training)
        cfg = getattr(self, "pretrained_cfg", {})
        if cfg.get("label_names"):
            self.pretrained_cfg = self.default_cfg = {key: cfg[key] for key in cfg if not key.startswith("label_")}

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Firing rates after the encoder (index 0) and after each stage.

        Args:
            x: Images ``(B, C, H, W)`` or event frames ``(B, T, C, H, W)``.
            indices: The last n if an integer, all if None, else which ones.
            norm: Without effect: there is no final norm.
            stop_early: Skip the stages after the last one asked for.
            output_fmt: ``NCHW``.
            intermediates_only: Return the intermediates alone.

        Returns:
            Final features (those of `forward_features`) and the intermediates, each ``(B, C', H', W')``.
        """
        assert output_fmt == "NCHW", "Output shape must be NCHW."
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        membrane = self._encode(x)
        features = membrane.unflatten(0, [self.num_steps, membrane.shape[0] // self.num_steps]).mean(0)
        mark = not_finite_marked(features.detach().new_zeros(features.shape[0], 1, 1, 1), x, self.bn1)
        features = features + mark
        intermediates = [features] if 0 in take_indices else []
        spikes = self.lif(membrane)
        bits: Tensor | None = None
        stages = [getattr(self, name) for name in STAGES[: len(self.feature_info) - 1]]
        for i, stage in enumerate(stages[:max_index] if stop_early else stages, start=1):
            membrane, spikes, bits = stage(membrane, spikes, bits)
            if len(stage):
                features = self._rate(spikes)
                features = features + mark.to(features.dtype)
            if i in take_indices:
                intermediates.append(features)
        return intermediates if intermediates_only else (features, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last of ``indices`` and, where asked for or no longer fitting, the classifier."""
        last = len(self.feature_info) - 1
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        for name in STAGES[max_index:]:
            setattr(self, name, Stage())
        if max_index == 0:
            self.lif = nn.Identity()  # the features end at the encoder's output
        if max_index < last:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        if prune_head or max_index < last:
            self.reset_classifier(0, "")
        return take_indices

    def _encode(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _rate(self, spikes: Tensor) -> Tensor:
        raise NotImplementedError
