"""Run a script of timm, such as validate.py, with the models of this package registered.

timm's scripts find models by name in its registry, which `import timm_gac` extends. A script without a
``--device-modules`` option has no way to import it, so this module does and then runs the script as if it had been
started itself: its ``__name__``, its arguments, and its folder first on the import path. For timm's onnx_export.py
PyTorch also learns what this package's operators are made of.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from ..runtime.plugins import OPTION, import_plugin, take_plugins

HELP = """usage: python -m timm_gac.run [--plugin FILE] SCRIPT [ARGUMENT ...]

Run a Python script with the models of timm_gac registered in timm.

  --plugin     a Python file or a module to import first, such as one that registers a neuron; more than once if need be
  SCRIPT       a script, such as validate.py, benchmark.py or inference.py of a clone of pytorch-image-models
  ARGUMENT     what follows is the script's own, --help included

python -m timm_gac.run pytorch-image-models/validate.py --model gac_msresnet34 --data-dir FOLDER
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a script; 0 unless the script raises `SystemExit` itself, 2 where there is no script to run.

    Args:
        arguments: Plugins, the script and its arguments; those of the process where None.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] in (["-h"], ["--help"]):
        sys.stdout.write(HELP)
        return 0
    ahead = 0  # what comes before the script; behind it --plugin is the script's own
    while ahead < len(given) and given[ahead].partition("=")[0] == OPTION:
        ahead += 1 if "=" in given[ahead] else 2
    try:
        plugins, _ = take_plugins(given[:ahead])
        given = given[ahead:]
        if problem := _problem(given):
            raise ValueError(problem)
        for plugin in plugins:
            import_plugin(plugin)
    except ValueError as error:
        sys.stderr.write(f"timm_gac.run: {error}\n")
        return 2
    import timm_gac  # noqa: F401 (registers the models)
    from gac_kernels.decompositions import registered_decompositions

    script = given[0]
    argv, path = sys.argv, sys.path
    sys.argv, sys.path = given, [str(Path(script).resolve().parent), *sys.path]
    try:
        with registered_decompositions() if Path(script).name == "onnx_export.py" else nullcontext():
            runpy.run_path(script, run_name="__main__")
    finally:
        sys.argv, sys.path = argv, path
    return 0


def _problem(given: Sequence[str]) -> str:
    """Why there is nothing to run, and what to do; empty where there is."""
    if not given:
        return "expected a script, got none: give its path, such as pytorch-image-models/validate.py, or --help"
    if given[0].startswith("-"):
        return f"expected a script first, got the option {given[0]!r}: put the script's options behind its path"
    if not Path(given[0]).is_file():
        return (
            f"expected a script, got {given[0]!r}, which is no file: check the path; timm's scripts are in a clone of "
            "https://github.com/huggingface/pytorch-image-models, not in the installed package"
        )
    return ""


if __name__ == "__main__":
    sys.exit(main())
