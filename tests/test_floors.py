"""The shape of the repository: imports go down, files stay readable, heavy libraries stay where they are."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FLOORS = (
    {"gathering", "image_headers", "settings", "tables"},
    {"tiff_io"},
    {"image_io", "metrics", "networks", "object_metrics", "spool"},
    {
        "cli",
        "ema",
        "events",
        "export_layers",
        "losses",
        "mixing",
        "model",
        "optim",
        "plots",
        "processes",
        "regions",
        "rle",
        "shares",
        "slide_sources",
        "tile_pyramid",
        "tiling",
        "transforms",
        "warp",
    },
    {"augmentations", "crops", "predecessor"},
    {"tracking"},
    {
        "checkpoint",
        "pairing",
        "polygons",
        "postprocess",
        "run_folder",
        "slide_io",
        "slide_writer",
        "weights",
    },
    {"memory", "model_list", "onnx_export", "unlike"},
    {"export_graph", "quantisation"},
    {"torchscript"},
    {"backends", "classes", "geojson", "outputs", "pictures", "result_record", "tissue"},
    {"export_proof", "facts", "slide_masks"},
    {"slide_windows"},
    {"slide_index"},
    {"dataset", "results", "slide_scan"},
    {"augmented_sheets", "noisy_labels", "scan", "shared_batches"},
    {"normalisation"},
    {"predictor"},
    {"annotation", "slide_scoring"},
    {"picture_prediction", "video_results"},
    {"evaluation", "learner"},
    {"trainer", "video_prediction"},
    {"baselines", "export_measure", "folds", "foreign_onnx", "lr_finder", "selfsupervised", "train_options"},
    {"export_file", "pretrain_options"},
    {"export_report", "fewer_bits"},
    {"annotate", "export_onnx", "predict", "pretrain", "train", "validate", "dataset_utils", "benchmarks"},
)
COMMANDS = FLOORS[-1]
FUNCTION_LINES, FILE_LINES = 60, 620

# Who may import it at all; the others do not pay for it.
HEAVY = {
    "albumentations": set(),
    "matplotlib": {"plots.py"},
    "segmentation_models_pytorch": {"model.py"},
    "timm": {"model.py", "selfsupervised/mae.py"},
    "accelerate": {"learner.py"},
    "onnx": {"onnx_export.py", "export_graph.py", "foreign_onnx.py", "quantisation.py"},
    "onnxruntime": {"onnx_export.py", "export_onnx.py", "quantisation.py"},
    "transformers": {"annotation/sam.py"},
    "ultralytics": {"annotation/detectors.py"},
}
FORBIDDEN_FOLDERS = {"ssl", "models", "utils"}  # they break https, torch.hub and searching


def list_sources() -> list[Path]:
    """The project's own Python files, tests left out, as paths relative to the root."""
    found = [*ROOT.glob("*.py")]
    for folder in set().union(*FLOORS):
        found += (ROOT / folder).glob("**/*.py")
    return sorted(path.relative_to(ROOT) for path in found)


def parse(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def list_imports(tree: ast.Module) -> Iterator[str]:
    """Top-level names of everything imported, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


def find_upward_imports(name: str, tree: ast.Module) -> list[str]:
    """Imports of the module or folder `name` from its own floor or a higher one."""
    floor = {member: level for level, members in enumerate(FLOORS) for member in members}
    return [other for other in list_imports(tree) if floor.get(other, -1) >= floor[name] and other != name]


@pytest.mark.parametrize("path", list_sources(), ids=str)
def test_imports_go_down(path):
    name = path.parts[0].removesuffix(".py")
    assert any(name in members for members in FLOORS), f"{path} has no floor: add {name} to FLOORS"
    assert find_upward_imports(name, parse(path)) == []


def test_an_upward_import_is_found():
    tree = ast.parse("def f():\n    from trainer import fit\n    import cli, numpy\n")
    assert find_upward_imports("dataset", tree) == ["trainer"]
    assert find_upward_imports("losses", tree) == ["trainer", "cli"]
    assert find_upward_imports("validate", tree) == []
    assert find_upward_imports("validate", ast.parse("import train")) == ["train"]


def test_tiling_knows_no_model():
    own = set().union(*FLOORS)
    assert own.intersection(list_imports(parse(Path("tiling.py")))) == set()


@pytest.mark.parametrize("path", list_sources(), ids=str)
def test_heavy_libraries_stay_in_their_module(path):
    if path.parts[0] != "benchmarks":
        for library in set(HEAVY).intersection(list_imports(parse(path))):
            assert path.as_posix() in HEAVY[library], f"{path} imports {library}"


@pytest.mark.parametrize("path", list_sources(), ids=str)
def test_sizes(path):
    lines = (ROOT / path).read_text(encoding="utf-8").count("\n")
    assert lines <= FILE_LINES, f"{path} has {lines} lines"
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = (node.end_lineno or 0) - node.lineno + 1
            assert size <= FUNCTION_LINES, f"{path}:{node.lineno} {node.name} has {size} lines"


MODULES = [path for path in list_sources() if path.parts[0].removesuffix(".py") not in COMMANDS]


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_modules_do_not_print(path):
    calls = [node.func for node in ast.walk(parse(path)) if isinstance(node, ast.Call)]
    assert [call.lineno for call in calls if isinstance(call, ast.Name) and call.id == "print"] == []


def test_nothing_hides_a_module_of_python():
    for path in list_sources():
        assert len(path.parts) > 1 or path.stem not in sys.stdlib_module_names, f"{path} hides a module of Python"
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()}
    assert folders & FORBIDDEN_FOLDERS == set()


@pytest.mark.parametrize("name", sorted(name for name in COMMANDS if (ROOT / f"{name}.py").is_file()))
def test_help_does_not_load_what_training_needs(name):
    code = f"import sys, {name}; {name}.build_parser(); print(sorted({set(HEAVY)} & set(sys.modules)))"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
