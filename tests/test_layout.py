"""The plan of the packages, held by reading imports: who may know whom, what is heavy, what is shipped."""

import ast
import dataclasses
import graphlib
import json
import subprocess
import sys
from pathlib import Path

import fastunlearn_kernels
import pytest

import fastunlearn

ROOT = Path(__file__).resolve().parents[1]
ENGINE = Path(fastunlearn.__file__).parent
KERNELS = Path(fastunlearn_kernels.__file__).parent


def module_name(path):
    parts = path.relative_to(ENGINE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ENGINE.rglob("*.py"))}


def is_for_type_checkers(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports_of(path, *, at_import_time):
    """Absolute names that a file imports: all of them, or those that run when it is imported."""
    name = module_name(path)
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    result = set()

    def visit(node):
        if is_for_type_checkers(node) or (at_import_time and isinstance(node, ast.FunctionDef | ast.Lambda)):
            return
        if isinstance(node, ast.Import):
            result.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            # `from . import x` names a module or something in the package
            submodules = {f"{source}.{alias.name}" for alias in node.names} & MODULES.keys()
            result.update(submodules or {source})
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return result


def ours(names):
    return {name for name in names if name.split(".")[0] == "fastunlearn"}


def tops(names):
    return {name.split(".")[0] for name in names}


ALL = {name: imports_of(path, at_import_time=False) for name, path in MODULES.items()}
AT_IMPORT = {name: imports_of(path, at_import_time=True) for name, path in MODULES.items()}
HEAVY = {"torch", "diffusers", "transformers", "deepspeed", "xformers", "lpips", "torchvision", "fastunlearn_kernels"}


def test_the_reading_of_imports_sees_what_is_there():
    """Else the tests below could pass by seeing nothing."""
    assert {"torch", "fastunlearn_kernels", "fastunlearn.training.bank", "fastunlearn.methods.recipe"} <= AT_IMPORT[
        "fastunlearn.training.trainer"
    ]
    assert "fastunlearn.worlds" in AT_IMPORT["fastunlearn.models.loading"]
    assert {"fastunlearn.methods.recipe", "fastunlearn.methods"} <= AT_IMPORT["fastunlearn.methods.esd"]
    assert "fastunlearn.training.unlearn" in ALL["fastunlearn.cli.main"] - AT_IMPORT["fastunlearn.cli.main"]


def test_the_kernels_know_nothing_of_the_engine():
    for path in KERNELS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = ["." * node.level + (node.module or "")]
            for name in names:
                assert name.split(".")[0] not in ("fastunlearn", "fastunlearn_kernels"), f"{path}: {name}"


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("fastunlearn.methods.")])
def test_a_method_knows_the_recipe_and_little_else(name):
    shared = {"fastunlearn.methods.recipe", "fastunlearn.methods.rules", "fastunlearn.methods.closed_form"}
    known = {*shared, "fastunlearn.methods", "fastunlearn.errors"}
    assert ours(ALL[name]) <= known
    assert not tops(AT_IMPORT[name]) & HEAVY
    assert tops(ALL[name]) & HEAVY <= {"torch"}, "an edit is linear algebra"


def test_the_vocabulary_and_the_settings_are_light():
    for name in ("methods.recipe", "config", "methods", "files.run_folder"):
        assert not tops(ALL[f"fastunlearn.{name}"]) & HEAVY, name


def test_training_and_evaluating_do_not_know_each_other():
    def reach(name, seen):
        for other in ours(ALL[name]) & MODULES.keys():
            if other not in seen:
                reach(other, seen | {other})
                seen.add(other)
        return seen

    assert "fastunlearn.evaluation.evaluator" not in reach("fastunlearn.training.trainer", set())
    assert "fastunlearn.training.trainer" not in reach("fastunlearn.evaluation.evaluator", set())


def test_metrics_know_worlds_but_no_single_one():
    for name in MODULES:
        if name.startswith("fastunlearn.metrics"):
            known = {other for other in ours(ALL[name]) if other.startswith("fastunlearn.worlds")}
            assert known <= {"fastunlearn.worlds", "fastunlearn.worlds.base"}, name


def test_training_calls_evaluation_in_one_place():
    wing = {name for name in MODULES if name.startswith("fastunlearn.training.")}
    knowing = {name for name in wing if any(other.startswith("fastunlearn.evaluation") for other in ours(ALL[name]))}
    assert knowing == {"fastunlearn.training.conclude"}


def test_a_methods_options_and_a_rules_name_are_known_to_nobody_else():
    """Else a method with an option, or another rule, would cost more than its own file."""
    from fastunlearn.methods import all_methods, rules

    options = {
        f.name for method in all_methods().values() if method.options for f in dataclasses.fields(method.options)
    }
    own = {"Alternate", "Saddle", "Project", *options}
    for name, path in MODULES.items():
        if not name.startswith("fastunlearn.methods."):
            tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            words = {
                getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "arg", None) for node in tree
            }
            assert not words & own, name
    assert {"Alternate", "Saddle", "Project"} <= set(dir(rules))


def test_only_the_engine_may_import_deepspeed_and_only_inside():
    assert {name for name in MODULES if "deepspeed" in tops(ALL[name])} == {"fastunlearn.training.engine_deepspeed"}
    assert not [name for name in MODULES if "deepspeed" in tops(AT_IMPORT[name])]


def test_diffusers_and_transformers_are_imported_inside():
    for name in MODULES:
        assert not tops(AT_IMPORT[name]) & {"diffusers", "transformers", "lpips", "torchvision"}, name


def test_only_models_know_diffusers():
    """`api` and `evaluator` ask for its version, to record it."""
    knowing = {name for name in MODULES if tops(ALL[name]) & {"diffusers", "transformers"}}
    assert knowing <= {
        "fastunlearn.training.unlearn",
        "fastunlearn.evaluation.evaluator",
        "fastunlearn.models.runtime",
        "fastunlearn.judges.clip",  # a model that looks at images, and is none to unlearn
    }


def test_nothing_imports_the_command_line():
    knowing = {name for name in MODULES if "fastunlearn.cli.main" in ALL[name]}
    assert knowing == {"fastunlearn.__main__"}


#: What each file or folder of the package may import of it, at any time: the plan of the house, from the ground up.
GROUND = {"errors", "batching", "config", "distributed", "files", "plugins", "progress"}
SAID = {*GROUND, "record", "schema"}
WORDS = {*SAID, "worlds", "prompts", "concepts", "concept_prompts", "methods", "models"}
DIRECTIONS = {
    **{"errors": set(), "batching": set(), "progress": set()},
    **{name: {"errors"} for name in ("config", "distributed", "files", "plugins")},
    "worlds": {"errors", "plugins"},
    "prompts": {"errors", "files", "concepts"},
    "concept_prompts": {"errors"},
    "concepts": {"errors", "files"},
    "record": {"errors", "files"},
    "schema": {"errors", "record"},
    "methods": {"errors", "config", "plugins"},
    "models": {*GROUND, "record", "worlds", "methods"},
    "metrics": {*GROUND, "worlds", "models"},
    "judges": {*SAID, "worlds", "concept_prompts", "models"},
    "reports": {"errors", "files", "schema"},
    "evaluation": {*WORDS, "metrics", "judges", "reports"},
    "training": {*WORDS, "metrics", "judges", "evaluation"},
    "attacks": {*WORDS, "metrics", "judges", "reports", "evaluation", "training"},
    "cli": {*WORDS, "metrics", "judges", "reports", "evaluation", "training", "attacks"},
    "__main__": {"cli"},
}


def place_of(name):
    """The file or folder of the package in which a module lies; empty for the package itself."""
    return ".".join(name.split(".")[1:2])


def known_places():
    """place -> the other places that it imports, at any time."""
    known = {place_of(name): set() for name in MODULES if place_of(name)}
    for name in MODULES:
        if place_of(name):
            known[place_of(name)] |= {place_of(other) for other in ours(ALL[name])} - {place_of(name), ""}
    return known


@pytest.mark.parametrize("place", sorted(known_places()))
def test_a_wing_imports_only_what_stands_below_it(place):
    assert known_places()[place] <= DIRECTIONS[place]


def test_the_plan_names_no_wing_that_is_not_there_and_has_no_cycle():
    assert set(DIRECTIONS) == set(known_places())
    order = list(graphlib.TopologicalSorter(DIRECTIONS).static_order())
    assert order.index("errors") < order.index("models") < order.index("evaluation") < order.index("training")
    assert list(graphlib.TopologicalSorter(known_places()).static_order())


#: What importing a public name may load of the package, beside the ground; and whether it may load torch.
NUMBERS = {"worlds", "prompts", "concepts", "methods", "models", "metrics", "judges", "record", "schema"}
LOADS = {
    **{name: (set(), False) for name in ("Reporter", "UserError")},
    **{name: ({"evaluation", "models"}, False) for name in ("EvaluateConfig", "EvaluateImagesConfig")},
    "TrainConfig": ({"training", "models"}, False),
    **{name: ({"judges", "record", "schema"}, True) for name in ("Judge", "Verdicts", "load_judge")},
    **{name: ({"metrics", "worlds"}, True) for name in ("Metric", "PerceptualDistance")},
    **{name: ({"metrics", "worlds"}, True) for name in ("load_metric", "load_perceptual")},
    "load_model": ({"models", "methods", "worlds", "record"}, True),
    "EvaluationReport": ({*NUMBERS, "evaluation"}, True),
    "evaluate": ({*NUMBERS, "evaluation"}, True),
    "AttackConfig": ({"attacks"}, False),
    **{
        name: ({*NUMBERS, "concept_prompts", "evaluation", "training", "reports", "attacks"}, True)
        for name in ("AttackReport", "attack")
    },
    "evaluate_images": ({*NUMBERS, "evaluation", "reports"}, True),
    "UnlearnResult": ({"training", "models", "methods", "worlds", "record", "schema"}, True),
    "unlearn": ({*NUMBERS, "concept_prompts", "training", "evaluation"}, True),
}


def test_importing_a_public_name_loads_its_wing_alone():
    """Neither matplotlib, nor the libraries of models, nor DeepSpeed, nor the trainer for who only evaluates."""
    assert set(LOADS) == set(fastunlearn.__all__) - {"__version__"}
    heavy_names = sorted(HEAVY | {"matplotlib", "rich"})
    script = f"""
import json, os, sys
told = {{}}
for name in {sorted(LOADS)!r}:
    read, write = os.pipe()
    if os.fork() == 0:  # each name in a process that has loaded nothing yet
        import fastunlearn
        getattr(fastunlearn, name)
        loaded = [module for module in sys.modules if module.split(".")[0] == "fastunlearn"]
        os.write(write, json.dumps([loaded, [module for module in {heavy_names!r} if module in sys.modules]]).encode())
        os._exit(0)
    os.close(write)
    told[name] = json.loads(os.fdopen(read).read())
print(json.dumps(told))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
    for name, (modules, heavy) in json.loads(done.stdout).items():
        wings, may_torch = LOADS[name]
        assert {place_of(module) for module in modules} - {""} <= GROUND | wings, name
        engines = [module for module in modules if "trainer" in module or "engine" in module]
        assert not engines or name == "unlearn", (name, engines)
        assert set(heavy) <= ({"torch", "fastunlearn_kernels"} if may_torch else set()), name


def test_imports_have_no_cycle():
    graph = {name: (ours(AT_IMPORT[name]) & MODULES.keys()) - {name, "fastunlearn"} for name in MODULES}
    assert list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("module", ["fastunlearn", "fastunlearn.cli.main", "fastunlearn.config", "fastunlearn.methods"])
def test_a_light_module_loads_nothing_heavy(module):
    script = f"import {module}, sys; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there():
    assert set(dir(fastunlearn)) == set(fastunlearn.__all__)
    assert all(getattr(fastunlearn, name) is not None for name in fastunlearn.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        fastunlearn.nonsense  # noqa: B018


@pytest.mark.parametrize("folder", ["kernels", "benchmarks", "tests", "tools"])
def test_a_folder_of_the_repository_is_no_package(folder):
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()


def test_no_module_lies_in_kernels_itself():
    """A top-level `kernels` with code would be imported by diffusers in place of the package of that name."""
    assert not list((ROOT / "kernels").glob("*.py"))
