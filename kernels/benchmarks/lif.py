"""Benchmark `lif` against its rivals and append the rows to results.csv beside this file; see --help."""

from pathlib import Path

from timm_gac.benchmark import KernelBenchConfig, main

if __name__ == "__main__":
    raise SystemExit(main(KernelBenchConfig(ops=("lif",), csv=Path(__file__).with_name("results.csv"))))
