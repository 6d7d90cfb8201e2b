"""Reports as files: the page in a browser, hostile texts in every format, LaTeX that compiles."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
import pytest
import records
from PIL import Image

from dqx import __main__
from dqx.record.collection import Run
from dqx.record.folder import RunFolder
from dqx.record.words import visible
from dqx.report import compare, content, figures, latex, markdown, page
from dqx.report.command import main

if TYPE_CHECKING:
    from playwright.sync_api import Page

SCRIPT = "</pre></script><script>pwned = 1</script><img src=http://example.com/x onerror='pwned = 1'>"
HOSTILE = SCRIPT + "{{ 7 * 7 }}\x1b[31m\x00\u202e"
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
STYLE = Path(content.__file__).parent / "templates" / "style.css"


def hostile(task: str, scores: list[int], category: str):
    result = records.task_result(task, scores, category)
    for row in result.documents:
        object.__setattr__(row, "prediction", HOSTILE)
        object.__setattr__(row, "target", HOSTILE)
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of three runs, one of them hostile, and of one that has not finished."""
    runs, out = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("out")
    base = records.record()
    for i, (method, scores) in enumerate({"rtn": [0, 0, 0, 1], "gptq": [1, 1, 1, 0], "awq": [1, 0, 1, 0]}.items()):
        text = HOSTILE if i == 0 else ""
        side = {"a": hostile("a", scores, "math"), "b": records.task_result("b", [1, 1], "code")}
        record = replace(
            base,
            config=base.config | {"method": {"name": method}, "calib": base.config["calib"] | {"text": f"nano{text}"}},
            command=f"python launch.py method={method} {text}",
            warnings=[text] if text else [],
            full_precision={"a": hostile("a", [1, 1, 1, 1], "math"), "b": side["b"]},
            quantized=side,
            deltas=[],
            **({} if i == 0 else {"outliers": {}, "fidelity": {}}),
        )
        RunFolder(runs / f"{i}-{method}").write(record)
    RunFolder(runs / "killed").start({"seed": 0}, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dqx report", str(runs), "--out", str(out), "--preset", "qdlm_table5"])
        main()
    return out


@pytest.fixture(scope="module")
def opened(folder: Path) -> Iterator[tuple[Page, list[str]]]:
    """The page in a headless Chromium, and everything that it asked for or complained about."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        browser = None
    if browser is None:
        reason = "no Chromium or no playwright; the page was not opened"
        if os.environ.get("DQX_NEEDS_BROWSER"):
            pytest.fail(reason)
        pytest.skip(reason)
    told: list[str] = []
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=browser, args=FLAGS)
        page = started.new_page(viewport={"width": 1400, "height": 900})
        page.on("request", lambda request: told.append(request.url))
        page.on("console", lambda message: told.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: told.append(f"error: {error}"))
        page.goto((folder / "report.html").as_uri())
        yield page, told
        started.close()


def column(page: Page, name: str) -> list[str]:
    """The texts of a column of the table of runs, as it is shown."""
    return page.evaluate(
        """name => {
            const table = document.querySelector("section:has(#runs) table");
            const at = [...table.tHead.rows[0].cells].findIndex(cell => cell.textContent.startsWith(name));
            return [...table.tBodies[0].rows].map(row => row.cells[at].firstChild.textContent.trim());
        }""",
        name,
    )


def test_the_page_asks_for_nothing_and_complains_of_nothing(opened: tuple[Page, list[str]]) -> None:
    page, told = opened
    asked = [line for line in told if not line.startswith("data:")]
    assert asked == [page.url]
    assert page.evaluate("[typeof pwned, document.scripts.length]") == ["undefined", 1]
    assert page.locator("pre", has_text="<script>pwned = 1</script>").count() > 0  # shown as it is
    assert page.evaluate("[...document.images].every(image => image.src.startsWith('data:') && image.naturalWidth)")


def test_links_lead_somewhere_and_unfold_what_they_lead_to(opened: tuple[Page, list[str]]) -> None:
    page, _ = opened
    missing = page.evaluate(
        """() => [...document.querySelectorAll("a")].map(a => a.getAttribute("href"))
            .filter(href => href[0] !== "#" || !document.getElementById(href.slice(1)))"""
    )
    assert missing == []
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(element => element.id)")
    assert len(ids) == len(set(ids))
    assert not page.evaluate("document.getElementById('run-2').open")
    page.locator("td a[href='#run-2'], th a[href='#run-2']").first.click()
    page.wait_for_function("document.getElementById('run-2').open")
    page.locator("#run-2 summary", has_text="Configuration").click()
    assert page.locator("#run-2 pre", has_text="method:\n  name: gptq").is_visible()


def test_tables_sort_by_click_and_by_key(opened: tuple[Page, list[str]]) -> None:
    page, _ = opened
    head = page.locator("section:has(#runs) table.sortable").first.locator("thead th", has_text="average")
    before = column(page, "average")
    assert before == ["62.5", "87.5", "75.0"]
    for order, expected in (
        ("ascending", ["62.5", "75.0", "87.5"]),
        ("descending", ["87.5", "75.0", "62.5"]),
        ("none", before),
    ):
        head.locator("button").click()
        assert (head.get_attribute("aria-sort"), column(page, "average")) == (order, expected)
    head = page.locator("section:has(#runs) table.sortable").first.locator("thead th", has_text="method")
    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert column(page, "method") == ["awq", "gptq", "rtn"]
    first = page.locator("#summary + .side table tbody").first
    page.locator("#summary + .side table thead button").first.click()
    assert first.inner_text().startswith("full precision")  # stays on top


@pytest.mark.parametrize("width", [1400, 768, 375])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_scrolls_sideways_but_tables(opened: tuple[Page, list[str]], width: int, scheme: str) -> None:
    page, _ = opened
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    page.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")


def test_tables_are_whole_on_a_laptop(opened: tuple[Page, list[str]], tmp_path: Path) -> None:
    """Those of the three bundled tasks, with the longest names and numbers there are."""
    base, scores = records.record(outliers={}, fidelity={}), [1] * 20 + [0] * 2
    full, less = (
        {f"nano_{name}": records.task_result(f"nano_{name}", part, name) for name in ("facts", "sums", "code")}
        for part in ([1] * 22, scores[::-1])
    )
    config = base.config | {"task": {"limit": 22}, "method": {"name": "smoothquant"}}
    runs = [Run(Path(), replace(base, config=config, full_precision=full, quantized=less, deltas=[]))]
    (tmp_path / "report.html").write_text(page.page(content.of_runs(runs * 2)))
    laptop = opened[0].context.browser.new_page(viewport={"width": 1280, "height": 900})  # type: ignore[union-attr]
    laptop.goto((tmp_path / "report.html").as_uri())
    laptop.evaluate("document.querySelectorAll('details.run').forEach(details => { details.open = true; })")
    boxes = laptop.evaluate("[...document.querySelectorAll('.scroll')].map(box => [box.scrollWidth, box.clientWidth])")
    assert len(boxes) == 5
    assert [wide - room for wide, room in boxes] == [0] * 5
    laptop.close()


def test_figures_are_as_dark_as_the_page(opened: tuple[Page, list[str]]) -> None:
    page, _ = opened
    page.evaluate("document.querySelectorAll('details.run').forEach(details => { details.open = true; })")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        for figure in page.locator("#run-2 .gallery img").all():
            with Image.open(io.BytesIO(figure.screenshot())) as picture:
                grey = fmean(np.asarray(picture.convert("L")).ravel().tolist())
                assert (grey < 110) == (scheme == "dark")


def test_colours_can_be_read() -> None:
    """Contrast of at least 4.5 (WCAG AA) of every text on what it stands on, light and dark."""
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in STYLE.read_text().split("@media")[:2])
    on = {"text": ("ground", "raised"), "quiet": ("ground", "raised"), "link": ("ground", "raised")}
    on |= {tone: ("ground", f"{tone}-ground") for tone in ("good", "fair", "bad")}
    for colours in (light, dark):
        pairs = [(text, ground) for text, grounds in on.items() for ground in grounds]
        assert {pair: records.contrast(*(colours[name] for name in pair)) >= 4.5 for pair in pairs} == dict.fromkeys(
            pairs, True
        )


def test_the_files_are_whole(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert "killed" in page
    assert "it has not finished" in page
    assert "\x1b" not in page
    assert "\x00" not in page
    assert "49" not in re.findall(r"onerror=[^&]*&gt;(.{9})", page)  # a template in a text is text
    for name in ("report.md", "report.tex"):
        text = (folder / name).read_text()
        assert "\x1b" not in text
    assert "<script>" not in (folder / "report.md").read_text().replace("`", "<").split("## Runs")[0]
    drawn = {path.relative_to(folder / "figures").as_posix() for path in (folder / "figures").rglob("*.*")}
    assert {"accuracy_by_bits.png", "accuracy_by_bits.pdf", "run-1/divergence_by_step.png"} <= drawn
    assert "run-1/divergence_by_step.pdf" not in drawn  # for a run that is reported alone


def test_tables_are_printed_alone(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    RunFolder(tmp_path / "run").write(records.record())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dqx report", str(tmp_path), "--out", "-"])
        main()
    assert capsys.readouterr().out.startswith("### nano_llada\n\n| method | w3a16 |")


def test_published_tables_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first run: every cell is missing, and what would fill it is said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dqx report", "--preset", *(f"qdlm_table{n}" for n in range(1, 6))])
    main()
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<h1>qdlm_table1, qdlm_table2, qdlm_table3, qdlm_table4, qdlm_table5</h1>" in page
    assert page.count("python launch.py experiment=") == 5 + 8 + 12 + 8 + 12 + 4
    monkeypatch.setattr(sys, "argv", ["dqx report"])
    with pytest.raises(SystemExit):
        main()


EVIL = r"\input{x} $a$ 100 % #1 a_b ~^ {} & <i> `q` 'q' [x] -- é 中 " + '"'


def test_latex_is_escaped_and_compiles(tmp_path: Path) -> None:
    base = records.record(outliers={}, fidelity={})
    side = {EVIL: records.task_result(EVIL, [1, 0]), "b": records.task_result("b", [1, 0])}
    record = replace(base, model=base.model | {"name": EVIL}, full_precision=side, quantized=side, deltas=[])
    text = latex.latex(content.of_runs([Run(Path(), record)], presets=["qdlm_table1", "qdlm_table4"]))
    bare = re.sub(r"\\[\\{}$&#%_]", "", text)  # what is left of the special characters is ours
    assert "\\input" not in text
    assert "中" not in text
    assert bare.count("{") == bare.count("}")
    assert latex.escape(EVIL).startswith(r"\textbackslash{}input\{x\} \$a\$ 100 \% \#1 a\_b")
    compiles(tmp_path, text)


PAPER = r"\documentclass{article}\usepackage{booktabs%s}\begin{document}\input{report}\end{document}"


def compiles(folder: Path, text: str) -> None:
    """The fragment in a paper, in LaTeX's oldest fonts, with and without the package that makes tables fit."""
    if compiler := shutil.which("pdflatex"):
        (folder / "report.tex").write_text(text)
        for packages in ("", ",graphicx"):
            (folder / "paper.tex").write_text(PAPER % packages)
            command = [compiler, "-interaction=batchmode", "-halt-on-error", "paper.tex"]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            assert done.returncode == 0, (folder / "paper.log").read_text()[-2000:]


def test_latex_is_a_fragment_with_the_best_in_bold(tmp_path: Path) -> None:
    base, runs = records.record(outliers={}, fidelity={}), []
    for method, bits, scores in (
        ("rtn", "w3a16", [1, 0, 0, 0]),
        ("gptq", "w3a16", [1, 1, 0, 0]),
        ("awq", "w4a16", [1, 1, 1, 0]),
    ):
        config = base.config | {"method": {"name": method}, "bits": {"name": bits}}
        side = {"a": records.task_result("a", scores), "b": records.task_result("b", [1, 1])}
        full = {name: records.task_result(name, [1] * result.n) for name, result in side.items()}
        runs.append(Run(Path(), replace(base, config=config, full_precision=full, quantized=side, deltas=[])))
    part = runs[0].record
    better = {"b": records.task_result("b", [1, 1])}  # an average of one task of two is none to compare
    alone = replace(
        part, config=part.config | {"method": {"name": "quarot"}}, quantized=better, full_precision=better, deltas=[]
    )
    text = latex.latex(content.of_runs([*runs, Run(Path(), alone)]))
    assert not re.search(r"\\(documentclass|usepackage|begin\{document\}|clearpage)", re.sub("(?m)^%.*", "", text))
    averages, tasks = text.split(r"\begin{table}")[1:]
    rows = {row.partition(" & ")[0]: row for row in averages.splitlines() if " & " in row}
    assert [each for each in rows if each != "setting"] == ["w4a16", "w3a16"]
    assert rows["setting"] == r"setting & full precision & awq & rtn & gptq & quarot \\"
    assert re.findall(r"mathbf\{([\d.]+)", rows["w3a16"]) == ["75.0"]  # gptq's
    assert re.findall(r"mathbf\{([\d.]+)", rows["w4a16"]) == []  # of one method there is no best
    bold = [re.findall(r"mathbf\{([\d.]+)", row) for row in tasks.splitlines() if r"\texttt{w3a16}" in row]
    assert bold == [["100.0"], ["50.0", "100.0", "75.0"], ["100.0"]]  # of b all are, and are equal
    compiles(tmp_path, text)


@pytest.mark.parametrize("name", ["report.html", "report.md", "report.tex"])
def test_no_absolute_path_leaves_in_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Of runs in a folder named in full, with settings, a command, a note and a failure that name such places."""
    home = "/home/jane/models"
    base = records.record(outliers={})
    config = base.config | {
        "calib": base.config["calib"] | {"text": f"{home}/calib.jsonl"},
        "cache_dir": f"{home}/cache",
    }
    config |= {"model": {"name": "nano_llada", "path": f"{home}/llada"}}
    told = replace(
        base,
        config=config,
        command=f"python launch.py model.path={home}/llada",
        warnings=[f"{home}/llada has no tokenizer"],
    )
    object.__setattr__(told.full_precision["nano_sums"].documents[1], "prediction", "open('/etc/model/wrote')")
    RunFolder(tmp_path / "runs" / "one").write(told)
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "results.json").write_text("{")
    monkeypatch.setattr(sys, "argv", ["dqx report", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    main()
    text = (tmp_path / "out" / name).read_text()
    assert (home in text, str(tmp_path) in text) == (False, False)
    if name != "report.tex":
        assert ".../llada" in text
        assert ".../one" in text
        assert ".../broken" in text
    if name == "report.html":
        assert "/etc/model/wrote" in text  # what a model wrote is left as it is


def test_markdown_shows_texts_as_they_are() -> None:
    assert markdown.escape("<b> *a* _b_ a_b |c| [x](y) &lt; `q`") == (
        r"\<b\> \*a\* \_b\_ a_b \|c\| \[x](y) \&lt; \`q\`"
    )
    assert markdown.code("a|`b`") == "`` a\\|`b` ``"
    assert markdown.code("\x1b[0m\u202e") == r"`\x1b[0m\u202e`"
    assert visible("a\tb\nc\u2028\ud800") == "a\tb\nc\\u2028\\ud800"


def test_ctrl_c_while_figures_are_drawn_leaves_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    RunFolder(tmp_path / "run").write(records.record())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dqx report", "run"])
    monkeypatch.setattr(figures, "draw", interrupted)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    told = "interrupted; report/report.html, .md and .tex are there, figures are missing; the same command draws them\n"
    assert capsys.readouterr().err == told
    assert "nano_sums" in (tmp_path / "report" / "report.html").read_text()
    monkeypatch.setattr(content, "build", interrupted)
    with pytest.raises(SystemExit, match="130"):
        main()
    assert capsys.readouterr().err == "interrupted; nothing is written yet\n"


def test_ctrl_c_ends_a_comparison_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["dqx", "compare", "one", "other"])
    monkeypatch.setattr(compare.RunFolder, "read", interrupted)
    with pytest.raises(SystemExit, match="130"):
        __main__.main()
    assert capsys.readouterr().err == "interrupted; nothing is printed yet\n"
    monkeypatch.setattr(sys, "argv", ["dqx", "compare"])
    monkeypatch.setattr(__main__, "import_module", interrupted)  # so early that the command says nothing itself
    assert __main__.main() == 130
    assert capsys.readouterr().err == "interrupted\n"


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_bar_moves_while_figures_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It moves with every figure, ends full, and says which run it is at."""
    seen: list[float] = []

    class Bar(figures.tqdm):  # type: ignore[type-arg]
        def update(self, n: float | None = 1) -> bool | None:
            seen.append(self.n + (n or 0))
            return super().update(n)

    monkeypatch.setattr(figures, "tqdm", Bar)
    told = io.StringIO()
    told.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", told)
    report = content.of_runs([Run(Path(), records.record(outliers={}))])
    figures.draw(report, tmp_path)
    drawn = len(report.pictures) + len(report.run_pictures[0])
    assert seen == sorted(seen)
    assert len({round(place, 6) for place in seen}) >= drawn
    assert seen[-1] == 1 + len(figures.OF_RUN)
    assert "run 1 of 1" in told.getvalue()
