"""The installed package has every folder of the checkout."""

from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_pyproject_lists_every_package_folder():
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    listed = text[text.index("packages = [") :].partition("]")[0]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "minitx").rglob("__init__.py")}
    names = {".".join(folder.parts) for folder in folders} | {"minitx.weights"}
    found = {word.strip().strip('"') for word in listed.partition("[")[2].split(",")} - {""}
    assert found == names, f"differs in {found ^ names}"
