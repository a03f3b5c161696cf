"""README and docs: their Python blocks run, their links and paths lead somewhere, and the demo does what they say."""

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastae.cli import demo

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [
    README, *DOCS,
    *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "kernels/README.md", "examples/README.md")),
]  # fmt: skip
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def python_blocks(page: Path) -> list[str]:
    """Blocks marked `python`. Those marked `py` cannot run here: they need Triton's compiler, not its interpreter."""
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


# ---------------------------------------------------------------- code


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("page", [README, *DOCS], ids=name)
def test_every_python_block_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one namespace a page, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in python_blocks(page):
        exec(compile(block, name(page), "exec"), namespace)


@pytest.mark.usefixtures("one_thread")
def test_the_first_block_of_the_readme_has_twelve_lines_and_loads_the_model_it_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    first, *others = python_blocks(README)
    assert len([line for line in first.splitlines() if line.strip()]) == 12
    assert len(others) >= 3
    exec(first, {})
    assert capsys.readouterr().out.rstrip().endswith("True")  # the loaded model gives the same codes


def test_the_readme_fits_a_few_screens() -> None:
    assert len(README.read_text().splitlines()) <= 110


def test_there_are_blocks_to_run() -> None:
    assert sum(len(python_blocks(page)) for page in DOCS) >= 10


# ---------------------------------------------------------------- links and paths


def anchors(page: Path) -> Iterator[str]:
    """The anchors of a page's headings, as they are made on GitHub."""
    for heading in re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_relative_link_resolves(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text()))
    broken = []
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        found = (page.parent / target).resolve() if target else page
        if not found.exists() or (anchor and anchor not in anchors(found)):
            broken.append(link)
    assert broken == []


def test_every_page_of_the_docs_is_linked_from_the_readme() -> None:
    text = README.read_text()
    assert [page.name for page in DOCS if f"](docs/{page.name})" not in text] == []


@pytest.mark.parametrize("page", [README, *DOCS, ROOT / "CONTRIBUTING.md", ROOT / "kernels/README.md"], ids=name)
def test_every_path_in_code_style_exists(page: Path) -> None:
    """`fastae/nn/linear_act.py` and the like; in kernels/README.md also from `fastae_kernels/` on."""
    quoted = re.findall(r"`([\w.\-]+(?:/[\w.\-]+)+)/?`", FENCE.sub("", page.read_text()))
    tops = ("fastae", "kernels", "bench", "tests", "docs", "examples", ".ci")
    paths = [path for path in quoted if path.split("/")[0] in tops]
    assert [path for path in paths if not (ROOT / path).exists()] == []
    kernels = [path for path in quoted if path.split("/")[0] in ("jit", "fastae_kernels")]
    inside = (ROOT / "kernels", ROOT / "kernels/fastae_kernels")
    assert [path for path in kernels if not any((folder / path).exists() for folder in inside)] == []


# ---------------------------------------------------------------- what docs/design.md says


def test_the_import_table_is_that_of_the_layout_test() -> None:
    tree = ast.parse((ROOT / "tests/test_layout.py").read_text())
    table = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MAY_IMPORT"
    )
    section = (ROOT / "docs/design.md").read_text().split("## Who may import whom")[1].split("\n- ")[0]
    rows = [re.findall(r"`([\w.]+)`", line) for line in section.splitlines() if line.startswith("| `")]
    assert {package: set(others) for package, *others in rows} == table


# ---------------------------------------------------------------- the demo


def test_the_demo_trains_both_sides_to_the_same_loss_and_leaves_its_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo", "--out", str(tmp_path / "demo"), "--epochs", "2"])
    demo.main()
    out = capsys.readouterr().out
    rows = re.findall(r"^ *(fastae|plain PyTorch) +([\d.]+) +([\d.]+)% +([\d.]+) s", out, re.MULTILINE)
    assert [row[0] for row in rows] == ["fastae", "plain PyTorch"]
    assert float(rows[0][1]) == pytest.approx(float(rows[1][1]), rel=0.02)
    assert "784 -> 256" in out
    left = sorted(path.name for path in (tmp_path / "demo").iterdir())
    assert left == ["config.json", "history.json", "loss.png", "model.safetensors", "reconstructions.png"]
    history = json.loads((tmp_path / "demo/history.json").read_text())
    assert history["val_loss"][-1] == pytest.approx(float(rows[0][1]), abs=1e-6)
