"""Searches for launch parameters, run by hand once for each GPU; the results are reviewed.

    python -m timm_gac.bench.tune.neuron --update
    python -m timm_gac.bench.tune.network gac_msresnet18_cifar --steps 2 4 6 8 --update
    python -m timm_gac.bench.tune.convolutions gac_msresnet18_cifar --dtype int8 --batch 512 --update

`neuron` searches neuron and encoder kernels, `network` batch-norm kernels within a training step, `convolutions` the
Hopper kernels. ``--update`` writes the best parameters into this GPU's JSON file, which `gac_kernels.tuning` reads;
without it they are only printed. Nothing is searched at run time.
"""
