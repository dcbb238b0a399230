"""The distributions: what each ships and requires, and that one command installs engine and kernels."""

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path
from shutil import copytree, ignore_patterns

import fastunlearn_kernels
import pytest
import yaml
from fastunlearn_kernels import build

import fastunlearn
from fastunlearn.methods import all_methods

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "packaging" / "kernels"
GALLERY = ROOT / "packaging" / "gallery"
PROJECTS = {"fastunlearn": ROOT, "fastunlearn_kernels": KERNELS}
EVERY = {**PROJECTS, "fastunlearn_gallery": GALLERY}


def project_of(folder):
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def run(*command, cwd):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


# ---- what the files say


def test_all_have_one_version():
    (pin,) = (d for d in project_of(ROOT)["dependencies"] if d.startswith("fastunlearn-kernels"))
    assert pin == f"fastunlearn-kernels=={fastunlearn.__version__}"
    assert fastunlearn_kernels.__version__ == fastunlearn.__version__
    assert project_of(GALLERY)["dependencies"] == [f"fastunlearn=={fastunlearn.__version__}"]
    for name in EVERY:
        assert importlib.metadata.version(name) == fastunlearn.__version__


def test_what_tells_a_version_tells_this_one():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == fastunlearn.__version__
    assert citation["license"] == project_of(ROOT)["license"]
    newest = re.search(r"^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest[1] == fastunlearn.__version__


def test_the_changelog_names_every_method_and_the_classifiers_every_python():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert [name for name in all_methods() if f"`{name}`" not in text] == []
    for folder in PROJECTS.values():
        project = project_of(folder)
        told = {one.rpartition(" ")[2] for one in project["classifiers"] if re.search(r":: 3\.\d+$", one)}
        assert told == {"3.11", "3.12"}
        assert project["requires-python"] == ">=3.11,<3.13"


#: Modules whose package has another name.
NAMES = {"PIL": "pillow", "yaml": "pyyaml", "fastunlearn_kernels": "fastunlearn-kernels"}


def imported(path, *, at_import):
    """The top-level names of other packages that a file imports: at all, or when it is itself imported."""

    def visit(node):
        if at_import and (isinstance(node, ast.FunctionDef) or ast.unparse(node).startswith("if TYPE_CHECKING")):
            return
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            yield from (arg.value.split(".")[0] for arg in node.args[:1] if isinstance(arg, ast.Constant))
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    tree = ast.parse(path.read_text(encoding="utf-8"))
    known = {*sys.stdlib_module_names, "fastunlearn"}
    return {NAMES.get(name, name) for child in tree.body for name in visit(child)} - known


def test_what_is_imported_is_required_and_what_is_required_is_small():
    """What an extra brings is imported inside functions: who evaluates installs neither DeepSpeed nor matplotlib."""
    required = {re.match(r"[\w-]+", one)[0].lower() for one in project_of(ROOT)["dependencies"]}
    assert not required & {
        "deepspeed",
        "matplotlib",
        "peft",
        "timm",
        "onnxruntime",
        "torchmetrics",
        "pandas",
        "xformers",
    }
    files = sorted((ROOT / "fastunlearn").rglob("*.py"))
    assert {name: path for path in files for name in imported(path, at_import=True) - required} == {}
    everything = set().union(*(imported(path, at_import=False) for path in files))
    assert required - {"triton", "fastunlearn-kernels"} <= everything, "what nothing imports is required for nothing"
    assert "matplotlib" not in everything


@pytest.mark.slow
def test_evaluating_opens_no_gold_and_needs_none_of_the_extras(tmp_path):
    script = """
import json, sys
extras = ("deepspeed", "matplotlib", "peft", "pandas", "timm", "open_clip", "onnxruntime", "torchmetrics", "cleanfid")
sys.modules.update(dict.fromkeys(extras))  # none of them can be imported
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
from fastunlearn.cli.main import main
status = main(sys.argv[1:])
print(json.dumps([status, [file for file in opened if "weights" in file and "worlds" in file]]), file=sys.stderr)
"""
    words = [
        "evaluate",
        "--original",
        "shapes",
        "--unlearned",
        "shapes",
        "--forget",
        "star",
        "--num-inference-steps",
        1,
    ]
    words += [
        "--prompts",
        "a red ring;a blue heart",
        "--batch-size",
        2,
        "--control-pairs",
        2,
        "--output",
        tmp_path / "e",
    ]
    status, opened = json.loads(run(sys.executable, "-c", script, *words, cwd=ROOT).splitlines()[-1])
    assert status == 0
    assert opened
    assert not [file for file in opened if "gold" in file]


def test_the_sdist_leaves_out_nothing_that_tests_read():
    text = (ROOT / "MANIFEST.in").read_text(encoding="utf-8")
    tops = run("git", "ls-tree", "--name-only", "HEAD", cwd=ROOT).split() if (ROOT / ".git").exists() else []
    shipped = {"LICENSE", "README.md", "pyproject.toml", "fastunlearn", "MANIFEST.in"}  # by setuptools itself
    assert [
        name
        for name in tops
        if name not in shipped
        and not re.search(rf"(^| ){re.escape(name)}$|(^include| ).*{re.escape(name)}( |$)", text, re.MULTILINE)
    ] == []


def test_the_workflows_call_what_is_there():
    (workflow,) = (ROOT / ".github" / "workflows").glob("*.yml")
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"]
    assert set(jobs) == {"test", "lowest", "wheels", "docs"}
    assert jobs["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12"]
    called = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    scripts = [ROOT / command for command in called if command.startswith(".ci/")]
    assert {path.name for path in scripts} == {"run", "lowest"}
    for path in scripts:
        assert os.access(path, os.X_OK), path
        run("bash", "-n", path, cwd=ROOT)


def test_the_lowest_versions_are_those_of_the_project():
    lines = run(sys.executable, ROOT / "tools" / "lowest.py", "lora", cwd=ROOT).split()
    assert {"numpy==2.0", "peft==0.18"} <= set(lines)
    asked = (ROOT / ".ci" / "lowest").read_text(encoding="utf-8")
    for file in re.findall(r"tests/\w+\.py", asked):
        assert (ROOT / file).is_file()


def test_the_hooks_run_what_make_lint_runs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    asked = {hook["entry"].removeprefix(".venv/bin/").replace(" --force-exclude", "") for hook in hooks}
    make = (ROOT / "Makefile").read_text(encoding="utf-8")
    lint = make[make.index("\nlint:") :].split("\n\n")[0]
    for line in lint.splitlines()[2:]:
        assert line.removeprefix("\t$(BIN)/").removesuffix(" .").removesuffix(" --check") in asked, line


def test_the_kernels_require_torch_and_triton_as_the_engine_does():
    kernels, engine = project_of(KERNELS)["dependencies"], project_of(ROOT)["dependencies"]
    assert {re.match(r"\w+", requirement)[0] for requirement in kernels} == {"torch", "triton"}
    assert set(kernels) < set(engine)


@pytest.mark.parametrize("name", EVERY)
def test_the_installed_top_level_name_is_ours_alone(name):
    """A top-level `kernels`, `packaging`, `tests` or `benchmarks` would shadow, or be shadowed by, other packages."""
    assert importlib.metadata.distribution(name).read_text("top_level.txt").split() == [name]


@pytest.mark.skipif((ROOT / "PKG-INFO").is_file(), reason="an sdist holds files in the place of links")
def test_the_kernels_are_links_to_the_one_source():
    assert (KERNELS / "fastunlearn_kernels").resolve() == ROOT / "kernels/torch-ext/fastunlearn_kernels"
    assert (KERNELS / "LICENSE").resolve() == ROOT / "LICENSE"


def test_the_folder_packaging_does_not_shadow_the_package_of_that_name():
    assert not list((ROOT / "packaging").glob("*/__init__.py"))
    where = run(sys.executable, "-c", "import packaging.version; print(packaging.__file__)", cwd=ROOT)
    assert not where.startswith(str(ROOT / "packaging"))


@pytest.mark.parametrize("file", ["packaging/kernels/README.md", "kernels/CARD.md"])
def test_the_pages_of_the_kernels_list_every_function(file):
    table = "".join(re.findall(r"^\| (`.*?) \|", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"`(\w+)`", table)) == set(fastunlearn_kernels.__all__)


def test_the_example_of_the_kernels_runs():
    (example,) = re.findall(r"```python\n(.*?)```", (KERNELS / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(example, names)
    weight = names["model"].weight
    assert names["loss"] > 0
    assert names["optimizer"].state[weight]["exp_avg"].count_nonzero() == round(0.1 * weight.numel())


def test_only_metadata_asked_for_in_a_clone_names_the_folder_of_the_kernels(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    spec = importlib.util.spec_from_file_location("build_backend", ROOT / "packaging" / "build_backend.py")
    backend = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(backend)
    metadata = (
        "Name: fastunlearn\nRequires-Dist: torch\nRequires-Dist: fastunlearn-kernels==1.2\n\nfastunlearn-kernels==1.2\n"
    )
    kernels = tmp_path / "packaging" / "kernels"
    kernels.mkdir(parents=True)
    assert backend.with_local_kernels(metadata, kernels) == metadata
    (kernels / "pyproject.toml").touch()
    local = metadata.replace("fastunlearn-kernels==1.2", f"fastunlearn-kernels @ file://{kernels}", 1)
    assert backend.with_local_kernels(metadata, kernels) == local
    (tmp_path / "PKG-INFO").touch()  # an sdist is of a release, whose kernels were released too
    assert backend.with_local_kernels(metadata, kernels) == metadata


# ---- what is built and installed


def has_compiler():
    return build.find_compiler() is not None


def setuptools_is_here():
    try:
        return int(importlib.metadata.version("setuptools").split(".")[0]) >= 77
    except importlib.metadata.PackageNotFoundError:
        return False  # an isolated build fetches it


@pytest.fixture(scope="session")
def clone(tmp_path_factory):
    """What a clone of this tree holds."""
    anywhere = (".git", ".*cache", ".venv*", ".hypothesis", ".benchmarks", "__pycache__", "_native.so", "*.egg-info")
    ignore = ignore_patterns(*anywhere, "build", "dist")

    def leave(folder, names):
        return ignore(folder, names) | ({"demo", "run"} if Path(folder) == ROOT else set())

    return copytree(ROOT, tmp_path_factory.mktemp("clone") / "source", ignore=leave, symlinks=True)


@pytest.fixture(scope="session")
def built(clone, tmp_path_factory):
    """Name -> what `python -m build` made: sdist, the wheel made from it, and what it printed."""
    pytest.importorskip("build", reason="`build` is of the extra `dev`")
    result = {}
    for name, folder in EVERY.items():
        out = tmp_path_factory.mktemp(name)
        isolation = ["--no-isolation"] if setuptools_is_here() else []
        source = clone / folder.relative_to(ROOT)
        printed = run(sys.executable, "-m", "build", *isolation, "--outdir", out, source, cwd=out)
        (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
        result[name] = (sdist, zipfile.ZipFile(wheel), printed)
    return result


def make_environment(folder):
    """A fresh environment that borrows the packages of this one; (what runs its pip, its Python)."""
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    borrowed = importlib.metadata.distribution("torch").locate_file("")
    (site / "borrowed.pth").write_text(f"{borrowed}\n", encoding="utf-8")
    python = folder / "bin" / "python"
    # without an index: nothing of ours is on one
    options = ["--no-build-isolation", "--no-index"] if setuptools_is_here() else []
    return [sys.executable, "-m", "pip", "--python", python, "install", *options], python


def serves_the_cpu(python, folder):
    """What the installed kernels run on CPU tensors."""
    code = "import torch; from fastunlearn_kernels import launch; print(launch.backend_of(torch.ones(1)))"
    return run(python, "-c", code, cwd=folder).strip()


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_the_wheel_ships_its_package_whole_and_nothing_else(built, name):
    _, wheel, printed = built[name]
    package = {"fastunlearn_kernels": ROOT / "kernels/torch-ext"}.get(name, EVERY[name]) / name
    files = {path.relative_to(package.parent).as_posix() for path in package.rglob("*") if path.is_file()}
    shipped = {file for file in wheel.namelist() if ".dist-info/" not in file}
    library = "fastunlearn_kernels/_native.so"  # compiled for the wheel, wherever the tree has one, too
    assert shipped - {library} == {file for file in files if "__pycache__" not in file} - {library}
    assert (library in shipped) == (name == "fastunlearn_kernels" and has_compiler())
    tag = "py3-none-linux_" if library in shipped else "py3-none-any"
    assert tag in Path(wheel.filename).name
    assert f"{name}/py.typed" in shipped
    assert any(file.endswith("licenses/LICENSE") for file in wheel.namelist())
    assert "absent from the `packages`" not in printed


@pytest.mark.slow
def test_the_engine_ships_its_weights_templates_and_command(built):
    names = built["fastunlearn"][1].namelist()
    assert "fastunlearn/reports/templates/report.html.j2" in names
    assert "fastunlearn/worlds/shapes/weights/pipeline/unet/diffusion_pytorch_model.safetensors" in names
    assert any(name.endswith(".dist-info/entry_points.txt") for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_no_wheel_is_larger_than_40_mb(built, name):
    assert Path(built[name][1].filename).stat().st_size < 40e6


@pytest.mark.slow
def test_the_gallery_is_found_by_its_entry_point_and_says_who_drew(built):
    wheel = built["fastunlearn_gallery"][1]
    (entries,) = (file for file in wheel.namelist() if file.endswith(".dist-info/entry_points.txt"))
    assert wheel.read(entries).decode().split() == [
        "[fastunlearn.worlds]",
        "gallery",
        "=",
        "fastunlearn_gallery.world:GALLERY",
    ]
    assert any(file.endswith("licenses/fastunlearn_gallery/NOTICE") for file in wheel.namelist())


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_what_is_published_names_no_folder(built, name):
    sdist, wheel, _ = built[name]
    (metadata,) = (wheel.read(file).decode() for file in wheel.namelist() if file.endswith(".dist-info/METADATA"))
    required = re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)
    assert required
    assert not [requirement for requirement in required if "@" in requirement]
    ours = {requirement for requirement in required if re.match(r"fastunlearn(-kernels)?==", requirement)}
    needed = {"fastunlearn": "fastunlearn-kernels", "fastunlearn_gallery": "fastunlearn"}.get(name)
    assert ours == ({f"{needed}=={fastunlearn.__version__}"} if needed else set())
    with tarfile.open(sdist) as archive:
        assert all(member.isfile() or member.isdir() for member in archive)  # no link leaves it
        tops = {member.name.split("/")[1] for member in archive if member.name.count("/") > 0 and member.isdir()}
    whole = {path.name for path in ROOT.iterdir() if path.is_dir()}
    assert tops <= (whole if name == "fastunlearn" else {name}) | {f"{name}.egg-info"}


@pytest.mark.slow
def test_the_tests_of_an_sdist_run(built, tmp_path):
    """It holds every file of the clone that git knows, and its tests run where it is unpacked."""
    with tarfile.open(built["fastunlearn"][0]) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    if (ROOT / ".git").exists():
        known = {path for path in run("git", "ls-files", cwd=ROOT).split("\n") if path and (ROOT / path).is_file()}
        assert {path for path in known if not (source / path).exists()} == set()
    assert not list(source.rglob("*.so"))
    files = ("tests/test_config.py", "tests/test_report.py", "tests/kernels/test_contract.py")
    environment = f"PYTHONPATH={source}:{source / 'kernels' / 'torch-ext'}"
    run("env", environment, sys.executable, "-m", "pytest", "-q", *files, cwd=source)


@pytest.mark.slow
def test_one_command_installs_both_from_a_clone(clone, tmp_path):
    install, python = make_environment(tmp_path / "environment")
    run(*install, ".", cwd=clone)
    (site,) = (tmp_path / "environment").glob("lib/python*/site-packages")
    for name in PROJECTS:
        (metadata,) = site.glob(f"{name}-*.dist-info/METADATA")
        headers = metadata.read_text(encoding="utf-8").split("\n\n")[0]  # the README comes after them
        assert "Requires-Dist" in headers
        assert "file:" not in headers
        code = f"import {name}; print({name}.__file__)"
        assert run(python, "-c", code, cwd=tmp_path).strip() == str(site / name / "__init__.py")
    assert serves_the_cpu(python, tmp_path) == ("native" if has_compiler() else "reference")
    command = tmp_path / "environment" / "bin" / "fastunlearn"
    assert run(command, "--version", cwd=tmp_path).strip() == f"fastunlearn {fastunlearn.__version__}"


@pytest.mark.slow
def test_one_command_installs_both_in_place(clone, tmp_path):
    source = copytree(clone, tmp_path / "source", symlinks=True)
    install, python = make_environment(tmp_path / "environment")
    run(*install, "--editable", "packaging/kernels", "--editable", ".", cwd=source)
    files = {
        "fastunlearn": source / "fastunlearn",
        "fastunlearn_kernels": source / "kernels/torch-ext/fastunlearn_kernels",
    }
    for name, folder in files.items():
        with (folder / "__init__.py").open("a", encoding="utf-8") as file:
            file.write("\nedited = True\n")
        code = f"import {name}; print({name}.edited, {name}.__file__)"
        edited, where = run(python, "-c", code, cwd=tmp_path).split()
        assert edited == "True"
        assert Path(where).resolve() == folder / "__init__.py"
    assert serves_the_cpu(python, tmp_path) == ("native" if has_compiler() else "reference")


@pytest.mark.slow
def test_the_kernels_install_and_run_where_there_is_no_compiler(clone, tmp_path, monkeypatch):
    source = copytree(clone, tmp_path / "source", symlinks=True)
    install, python = make_environment(tmp_path / "environment")
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    run(*install, "--no-deps", "packaging/kernels", cwd=source)
    assert serves_the_cpu(python, tmp_path) == "reference"
