"""pytest plugin: runs timm's own ``tests/test_models.py`` on the models of this package.

`TIMM_SUITE_MODELS` holds comma-separated name patterns. timm's lists of models are narrowed to those of ours that
match, and families with hard-coded names that state a general contract are pointed at our models. What is left is about
other architectures, needs weights or is about TorchScript: it is deselected by name, with the reason, and listed at the
end of the run.
`TIMM_SUITE_REPORT`, if set, names a JSON file for the counts.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import timm
from torch import nn

import timm_gac  # noqa: F401  (registers the models)

PATTERNS = os.environ.get("TIMM_SUITE_MODELS", "*").split(",")
REPORT = os.environ.get("TIMM_SUITE_REPORT")

_list_models, _list_pretrained, _create_model = timm.list_models, timm.list_pretrained, timm.create_model
OURS = [
    name
    for name in _list_models()
    if timm.model_entrypoint(name).__module__.startswith("timm_gac.") and any(fnmatch(name, p) for p in PATTERNS)
]

# Families with hard-coded names that state what any timm model must do: parameters other than the model's name.
RETARGETED: dict[str, tuple[Any, ...]] = {
    "test_reset_classifier_keeps_pool": (),
    "test_prune_intermediate_layers_params_used": (),
    "test_head_hidden_size": ({},),
    "test_features_only_feature_cls_class": (),
    "test_forward_after_prune_intermediate_layers": (),
    "test_prune_intermediate_layers_last_feature": (True,),
    "test_prune_to_stem_feature": (),
    "test_forward_intermediates_stop_early_final_norm": ({},),
    "test_headless_checkpoint_reload": ({},),
}

# Families that would run on our models too, with the reason why they do not.
TORCHSCRIPT = "PyTorch has deprecated TorchScript; torch.export takes its place (tests/models/test_export.py)"
UNSUPPORTED = {"test_model_forward_torchscript": TORCHSCRIPT, "test_model_forward_fx_torchscript": TORCHSCRIPT}

# Families of which no parameter set is ours, with the reason.
NEEDS_WEIGHTS = "needs weights, and none of the selected models has published weights"
DESELECTED: dict[str, str] = {
    "test_model_inference": NEEDS_WEIGHTS,
    "test_model_load_pretrained": NEEDS_WEIGHTS,
    "test_model_features_pretrained": NEEDS_WEIGHTS,
    "test_model_default_cfgs_non_std": "for models without spatial features; ours pass the standard test",
    "test_features_only_grad_checkpointing_backward": "for FeatureListNet; the FeatureGetterNet of ours has no switch",
    "test_feature_getter_stage_ends_torchscript": TORCHSCRIPT,
    "test_model_features_output_stride": "for models with dilated stages (output_stride)",
    "test_model_forward_torchscript_with_features_fx": "fx features of regnet; ours use forward_intermediates",
    "test_model_init_weights_after_to_empty": "for models with an init_weights method",
    "test_model_features_space2depth_reduction": "efficientnet",
    "test_catavgmax_unsupported": "for models that reject concatenated pooling",
    "test_gcvit_*": "gcvit",
    "test_feature_hook_net_*": "xception, through feature hooks",
    "test_pruned_efficientnet_*": "efficientnet",
    "test_convit_*": "convit",
    "test_pruned_features_torchscript": "transformers with an image size",
    "test_inception_v3_*": "inception_v3",
    "test_prune_extra_blocks_*": "efficientnet and mobilenetv3",
    "test_prune_class_token_*": "transformers with a class token",
    "test_eva_*": "eva",
    "test_samvit_*": "samvit",
    "test_resnet_pruned_*": "resnet",
    "test_resnetv2_*": "resnetv2",
    "test_nfnet_*": "nfnet",
    "test_mobilenetv5_*": "mobilenetv5",
    "test_mobile_model_fusion_*": "models with re-parameterised blocks",
    "test_naflexvit_*": "naflexvit",
    "test_radio_*": "vision transformers",
    "test_gemma4_*": "gemma4_vit",
    "test_vit_*": "vision transformers",
    "test_hybrid_vit_*": "hybrid vision transformers",
    "test_efficientvim_*": "efficientvim",
    "test_swin_*": "swin",
    "test_relpos_*": "models with relative position biases",
    "test_eval_*": "models that cache attention biases",
    "test_attention_bias_*": "models that cache attention biases",
}


def _arch(name: str) -> str:
    return name.partition(".")[0]


def list_models(*args: Any, module: Any = "", **kwargs: Any) -> list[str]:
    """timm's `list_models`, narrowed to ours; a list of modules (those with intermediates) counts as including ours."""
    names = _list_models(*args, module=module if isinstance(module, str) else "", **kwargs)
    return [name for name in names if _arch(name) in OURS]


def list_pretrained(*args: Any, **kwargs: Any) -> list[str]:
    """timm's `list_pretrained`, narrowed to ours."""
    return [name for name in _list_pretrained(*args, **kwargs) if _arch(name) in OURS]


def create_model(*args: Any, **kwargs: Any) -> nn.Module:
    """timm's `create_model`, with random batch norms of the order of the threshold.

    An untrained spiking network in eval mode soon falls silent, and its residual branches may start at zero: without
    this, most of timm's comparisons would be of zeros with zeros.
    """
    model = _create_model(*args, **kwargs)
    for module in model.modules():
        if getattr(module, "running_var", None) is not None and not module.bias.is_meta:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, mean=0.0, std=0.5)
    return model


timm.list_models, timm.list_pretrained, timm.create_model = list_models, list_pretrained, create_model

_dropped: dict[str, tuple[str, int]] = {}
_counts: Counter[str] = Counter()
_skips: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    """Know timm's markers, so that they cause no warnings."""
    if not OURS:
        raise pytest.UsageError(f"expected patterns of our models in TIMM_SUITE_MODELS, got {PATTERNS}: none matches")
    for marker in [
        "base",
        "cfg",
        "cfg_nonstd",
        "forward",
        "backward",
        "features",
        "torchscript",
        "fxforward",
        "fxbackward",
    ]:
        config.addinivalue_line("markers", f"{marker}: a group of timm's tests")
    if not config.pluginmanager.hasplugin("timeout"):
        config.addinivalue_line("markers", "timeout(seconds): ignored without pytest-timeout")


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Point the general families with hard-coded names at our models."""
    extra = RETARGETED.get(metafunc.definition.originalname)
    if extra is None:
        return
    markers = metafunc.definition.own_markers
    for index, marker in enumerate(markers):
        if marker.name == "parametrize" and "model_name" in str(marker.args[0]):
            values = [(name, *extra) if extra else name for name in OURS]
            markers[index] = pytest.mark.parametrize(marker.args[0], values).mark


def _reason(item: pytest.Item) -> str | None:
    """Why an item is not run; None if it is."""
    name = getattr(item, "originalname", item.name)
    if name in UNSUPPORTED:
        return UNSUPPORTED[name]
    callspec = getattr(item, "callspec", None)
    if callspec is not None and _arch(str(callspec.params.get("model_name", ""))) in OURS:
        return None
    reasons = (why for pattern, why in DESELECTED.items() if fnmatch(name, pattern))
    return next(reasons, "other models, not classified yet")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what is not about our models or not supported, and remember the reason."""
    kept, dropped = [], []
    for item in items:
        why = _reason(item)
        if why is None:
            kept.append(item)
            continue
        dropped.append(item)
        name = getattr(item, "originalname", item.name)
        _dropped[name] = (why, _dropped.get(name, ("", 0))[1] + 1)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count outcomes, a test being one outcome whatever its phases."""
    if report.when == "call" or report.outcome != "passed":
        _counts[report.outcome] += 1
    if report.skipped:
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        _skips.append(f"{report.nodeid}: {why}")


def _lines() -> Iterable[str]:
    for name, (why, count) in sorted(_dropped.items()):
        yield f"deselected {name} ({count}): {why}"
    yield from (f"skipped {line}" for line in _skips)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List the deselected families with their reasons."""
    terminalreporter.section(f"timm {timm.__version__} suite on {', '.join(OURS)}")
    for line in _lines():
        terminalreporter.write_line(line)


def pytest_sessionfinish() -> None:
    """Write the counts for the caller."""
    if REPORT:
        report = {"timm": timm.__version__, "models": OURS, **_counts, "notes": list(_lines())}
        Path(REPORT).write_text(json.dumps(report, indent=2))
