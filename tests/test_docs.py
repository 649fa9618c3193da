"""The README and the pages in docs/ keep their word: their Python runs, their commands, names and links exist."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import timm

import timm_gac  # noqa: F401  (registers the models)
from timm_gac import cli
from timm_gac.models.build import registered_names
from timm_gac.runtime.plugins import take_plugins
from warm import WarmPython

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
README = TEXTS["README.md"]
# What a snippet may need beyond the test extras. Such a snippet runs where the library is installed.
OPTIONAL = ("nir", "onnxruntime", "snntorch", "spikingjelly")


def blocks(page: str, language: str) -> list[tuple[int, str]]:
    """Line in the page and text of each block of code in a language."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", TEXTS[page], flags=re.MULTILINE | re.DOTALL)
    return [(TEXTS[page].count("\n", 0, block.start(1)), block[1]) for block in found]


def needs(code: str) -> set[str]:
    nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name for node in nodes]
    return {name.partition(".")[0] for name in names} & set(OPTIONAL)


def last_needed(code: str) -> str:
    """The one that a snippet is tested for, where it needs several: the last, which comes with those before."""
    return max(needs(code), key=OPTIONAL.index, default="")


def run_blocks(warm_python: WarmPython, page: str, codes: list[tuple[int, str]], folder: Path) -> None:
    """Run snippets one after the other in one new process, each with names of its own."""
    shifted = [("\n" * line + code, page) for line, code in codes]  # tracebacks then show the page's own lines
    program = f"for code, page in {shifted!r}:\n    exec(compile(code, page, 'exec'), {{'__name__': 'snippet'}})"
    script = folder / "snippets.py"
    script.write_text(program, encoding="utf-8")
    done = warm_python([str(script)], cwd=folder)
    assert done.returncode == 0, done.stderr


def commands(page: str) -> list[list[str]]:
    lines = [shlex.split(line, comments=True) for _, block in blocks(page, "console") for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_runs(page: str, warm_python: WarmPython, tmp_path: Path) -> None:
    run_blocks(warm_python, page, [block for block in blocks(page, "python") if not needs(block[1])], tmp_path)


@pytest.mark.parametrize("library", OPTIONAL)
def test_python_with_an_optional_library_runs(library: str, warm_python: WarmPython, tmp_path: Path) -> None:
    codes = {page: [block for block in blocks(page, "python") if last_needed(block[1]) == library] for page in PAGES}
    assert any(codes.values()), "no page shows this library any more: take it out of OPTIONAL"
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    for page, found in codes.items():
        if found:
            run_blocks(warm_python, page, found, tmp_path)


def test_python_that_needs_a_file_compiles() -> None:
    found = [(page, code) for page in PAGES for _, code in blocks(page, "py")]
    assert len(found) >= 4
    for page, code in found:
        compile(code, page, "exec")


def test_readme_shows_the_two_commands() -> None:
    made = [command for command in commands("README.md") if command[0] == "make"]
    assert made[:2] == [["make", "demo"], ["make", "test"]]


def test_readme_is_short() -> None:
    assert len(README.split()) <= 1100
    assert [line for line in README.splitlines() if line.startswith("|") and len(line) > 100] == []


def options_of(arguments: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in arguments if word.startswith("--")]


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    inline = [words.split() for words in re.findall(r"`((?:make|timm-gac) [a-z -]+)`", TEXTS[page])]
    for program, *rest in [*commands(page), *inline]:
        if program == "make":
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
            assert rest[0] in targets, rest
        elif program == "timm-gac":
            rest = take_plugins(rest)[1]  # an option of all commands
            assert missing_options(rest, capsys) == [], rest
        elif program == "accelerate":
            assert rest[0] == "launch"
            module, script = "-m" in rest, [word for word in rest if word.endswith(".py")]
            assert module or (ROOT / script[0]).is_file(), rest
            if module:  # what follows are options of the trainer
                name, *given = rest[rest.index("-m") + 1 :]
                assert name == "timm_gac.train"
                assert missing_options(["train", *given], capsys) == [], rest
            for word in rest:
                assert not word.endswith(".yaml") or (ROOT / word).is_file(), rest
        elif rest[0] == "-m":
            assert program == "python"
            assert importlib.util.find_spec(rest[1]) is not None, rest
        else:
            assert program in ("python", "pip"), program
            assert program == "pip" or options_of(rest) == [
                option for option in options_of(rest) if option in (ROOT / rest[0]).read_text(encoding="utf-8")
            ], rest


def missing_options(rest: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Options of a command line that the command's help does not name."""
    subcommands = rest[: 2 if rest[0] == "bench" else 1]
    with pytest.raises(SystemExit) as leaving:
        cli.main([*subcommands, "--help"])
    assert leaving.value.code == 0, rest
    shown = capsys.readouterr().out
    return [option for option in options_of(rest) if option not in shown]


def test_every_command_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    listed = re.findall(r"^\| `timm-gac ([a-z ]+)` \|", TEXTS["docs/commands.md"], flags=re.MULTILINE)
    shown = {" ".join(command[1 : 3 if command[1] == "bench" else 2]) for command in commands("docs/commands.md")}
    assert set(listed) == shown, "every command has a line and an example"
    for group in ([], ["bench"]):
        with pytest.raises(SystemExit):
            cli.main([*group, "--help"])
        names = set(re.search(r"\{([a-z_,-]+)\}", capsys.readouterr().out)[1].split(","))
        assert names - {"bench"} == {name.split()[-1] for name in listed if name.startswith("bench") == bool(group)}


@pytest.mark.parametrize("page", ["README.md", "docs/models.md"])
def test_models_and_parameters_are_the_real_ones(page: str) -> None:
    named = set(re.findall(r"^\| `([a-z]\w*)` \|", TEXTS[page], flags=re.MULTILINE))
    registered = set(registered_names())
    assert named <= registered
    row = r"^\| `(\w+)` \|.*?\| (\d+,[\d,]*\d) ?(?:\((\d+) classes(?:, T=(\d+))?\))?"
    counts = re.findall(row, TEXTS[page], flags=re.MULTILINE)
    assert len(counts) == len(named) >= 3
    if page == "docs/models.md":
        assert {name for name in registered if "gac_" in name or "ann_" in name} <= named
        smaller = re.search(r"With 10 classes and T=4, `gac_msresnet18_cifar` has ([\d,]+) parameters", TEXTS[page])
        counts.append(("gac_msresnet18_cifar", smaller[1], "10", "4"))
    for name, count, classes, steps in counts:
        sizes = {"num_classes": int(classes)} if classes else {}
        sizes |= {} if "ann_" in name else {"num_steps": int(steps or 4)}
        model = timm.create_model(name, device="meta", **sizes)
        assert sum(parameter.numel() for parameter in model.parameters()) == int(count.replace(",", "")), name


@pytest.mark.parametrize("page", PAGES)
def test_links_to_files_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)", TEXTS[page]):
        assert (PAGES[page].parent / target).exists(), target


def test_files_that_contributing_names_exist() -> None:
    named = re.findall(r"`((?:timm_gac|kernels|tests|tools|docs|results|hub)/[^` ]+)`", TEXTS["CONTRIBUTING.md"])
    assert len(named) > 8
    assert [name for name in named if not list(ROOT.glob(name.replace("NAME", "*")))] == []


@pytest.mark.parametrize("package", ["timm_gac", "gac_kernels"])
def test_architecture_shows_the_rooms_in_their_order(package: str) -> None:
    (tree,) = [block for _, block in blocks("docs/architecture.md", "text") if f"{package}/" in block.splitlines()[0]]
    shown = [line.split()[0].removesuffix("/").removesuffix(".py") for line in tree.splitlines()[1:]]
    toml = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    rule = re.search(rf'containers = \["{package}"\].*?^layers = (\[.*?^\])', toml, flags=re.MULTILINE | re.DOTALL)
    layers = [layer.split(" | ") for layer in ast.literal_eval(rule[1])]
    assert len(shown) == len(set(shown)) == sum(map(len, layers))
    places = [next(place for place, layer in enumerate(layers) if room in layer) for room in shown]
    assert places == sorted(places)
