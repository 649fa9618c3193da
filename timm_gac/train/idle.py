"""Settings that would change nothing are refused before training, by name: nobody shall wait for what they do."""

from __future__ import annotations

from typing import Any

from .recipes import RECIPES, Recipe

# Fields that an ANN cannot do anything with.
_SPIKING = (
    "num_steps",
    "gate",
    "gate_lr",
    "gate_decay",
    "neuron",
    "neuron_lr",
    "tet_lambda",
    "pack_spikes",
    "int8_convs",
    "current_noise",
)
# Values that ask for nothing, where the default of `Recipe` asks for something.
_NOTHING: dict[str, Any] = {
    "num_steps": 1,
    **dict.fromkeys(("tet_lambda", "distill_weight", "mix_probability", "momentum"), 0.0),
}


def refuse_idle(recipe: Recipe, recipe_name: str, ann: str | None) -> None:
    """Refuse the first field that changes nothing in this recipe and says more than the default.

    Args:
        recipe: As it was given.
        recipe_name: Name of the recipe that it was made of, whose own values nobody asked for; after any other word,
            those of all recipes.
        ann: Name of the network where it is an ANN.

    Raises:
        ValueError: There is such a field.
    """
    usual = [RECIPES[recipe_name]] if recipe_name in RECIPES else [Recipe(), *RECIPES.values()]
    for name, wanted, found, remedy in _idle(recipe, ann):
        value, nothing = getattr(recipe, name), _NOTHING.get(name, getattr(Recipe, name))
        if value != nothing and value not in [getattr(other, name) for other in usual]:
            raise ValueError(
                f"expected {wanted} for {name}={value!r}, got {found}: {_without(name, nothing)}, or {remedy}"
            )


def _idle(recipe: Recipe, ann: str | None) -> list[tuple[str, str, str, str]]:
    """Fields without effect in this recipe: what each would need, what there is, and what to give instead."""
    idle = []
    if ann is not None:
        idle += [(name, "a spiking network", f"{ann}, an ANN", "choose another --model") for name in _SPIKING]
    if not recipe.weight_decay:
        idle.append(("gate_decay", "weight_decay > 0", f"weight_decay={recipe.weight_decay!r}", "give --weight-decay"))
    if recipe.loss != "tet":
        idle.append(("tet_lambda", "loss='tet'", f"loss={recipe.loss!r}", "give --loss tet"))
    if recipe.teacher is None:
        idle += [(name, "a teacher", "none", "name a --teacher") for name in ("distill_weight", "distill_temperature")]
    if recipe.optimizer != "sgd":
        idle.append(("momentum", "optimizer='sgd'", f"optimizer={recipe.optimizer!r}", "give --optimizer sgd"))
    if not (recipe.mixup or recipe.cutmix):
        idle.append(("mix_probability", "mixup or cutmix", "neither", "give one, such as --cutmix 1"))
    return idle


def refuse_idle_rate(recipe: Recipe, name: str, network: Any) -> None:
    """Refuse a rate or decay of parameters that no group of the optimiser has: there are none, or they are frozen.

    Args:
        recipe: Recipe of the run.
        name: ``gate_lr``, ``gate_decay`` or ``neuron_lr``.
        network: Its network.

    Raises:
        ValueError: Always.
    """
    args = network.model_args() if hasattr(network, "model_args") else {}
    if name.startswith("gate"):
        wanted, remedy = "a gate that learns", "choose a --model with gated attention coding and --gate full"
        found = f"gate={args['gate']!r}" if args.get("encoder") == "gac" else "a network without a gate"
    else:
        wanted, remedy = "neurons with a learned decay and threshold", "give --neuron plif"
        found = f"neuron={args['neuron']!r}" if "neuron" in args else "a network without such"
    if recipe.freeze_stages:
        found += f" and freeze_stages={recipe.freeze_stages}"
        remedy += ", which is not frozen" if name.startswith("gate") else ", not in frozen stages"
    raise ValueError(
        f"expected {wanted} for {name}={getattr(recipe, name)!r}, got {found}: {_without(name, 1.0)}, or {remedy}"
    )


def _without(name: str, nothing: Any) -> str:
    option = name.replace("_", "-")
    return f"give --no-{option}" if nothing is False else f"leave --{option} out"
