"""Searches for launch parameters, which a person runs once for a GPU and whose results are reviewed.

    python -m timm_gac.bench.tune.neuron --update
    python -m timm_gac.bench.tune.network gac_msresnet18_cifar --steps 2 4 6 8 --update
    python -m timm_gac.bench.tune.convolutions gac_msresnet18_cifar --dtype int8 --batch 512 --update

`neuron` searches neuron and encoder, `network` the batch-norm kernels within a training step, `convolutions` the Hopper
kernels. ``--update`` writes the best parameters into this GPU's JSON file, which `gac_kernels.tuning` reads; without it
they are only printed. Nothing searches at run time.
"""
