"""Benchmark `gac_encode` and `gated_lif` against their rivals; rows go to results.csv beside this file; see --help."""

from pathlib import Path

from timm_gac.benchmark import KernelBenchConfig, main

if __name__ == "__main__":
    results = Path(__file__).with_name("results.csv")
    raise SystemExit(main(KernelBenchConfig(ops=("gac_encode", "gated_lif"), csv=results)))
