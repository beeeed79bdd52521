"""The page: it has the numbers of the record, is safe and small, and opens in a browser without errors."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from hf_qst_plugins.command_line.__main__ import main
from hf_qst_plugins.report import page

from .conftest import record_of

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
HOVER = """<script>
const found = { tips: [], wide: document.documentElement.scrollWidth > innerWidth };
for (const svg of document.querySelectorAll(".chart svg")) {
  const place = svg.getBoundingClientRect();
  svg.dispatchEvent(new PointerEvent("pointermove", { clientX: place.left + place.width - 20, clientY: place.top + 20 }));
  found.tips.push(tip.hidden ? null : tip.textContent);
}
const out = document.createElement("pre");
out.id = "found";
out.textContent = JSON.stringify(found);
document.body.append(out);
</script>
"""


class Tables(HTMLParser):
    """Rows of cells of every table by id, and the content of elements with an id."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.texts, self.links, self._id, self._cell = {}, {}, [], None, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.links += [value for name, value in attrs.items() if name in ("src", "href")]
        if tag not in ("tr", "th", "td", "thead", "tbody"):
            self._id = attrs.get("id")
        if tag == "table":
            self.tables[self._id] = []
        elif tag == "tr":
            self.tables[self._id].append([])
        elif tag in ("th", "td"):
            self._cell = ""

    def handle_endtag(self, tag):
        if tag in ("th", "td"):
            self.tables[self._id][-1].append(self._cell)
            self._cell = None

    def handle_data(self, data):
        if self._cell is not None:
            self._cell += data
        elif self._id:
            self.texts[self._id] = self.texts.get(self._id, "") + data


def number(cell):
    return None if cell == "-" else float(cell.replace(",", ""))


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory):
    """Folders of one run of each kind."""
    folder = tmp_path_factory.mktemp("runs")
    model = ["--model", str(inputs / "model")]
    data = [*model, "--data", str(inputs / "text.jsonl"), "--other_data", str(inputs / "other.jsonl")]
    data += ["--max_length", "16"]
    training = [
        "--max_steps",
        "4",
        "--logging_steps",
        "1",
        "--use_cpu",
        "--quantization",
        "null",
        "--eval_strategy",
        "steps",
    ]
    sample = ["--prompts", "</script><img src=x onerror=alert(1)> t3", "--max_new_tokens", "4"]
    for argv in (
        ["finetune", *data, *training, *sample],
        ["prune", *data, *training, "--keep_ratio", "0.5", *sample],
        ["compress", *data, "--keep_ratio", "0.5"],
        ["bench", *model, "--prompt_length", "8", "--new_tokens", "2", "--repeats", "2"],
    ):
        assert main([*argv, "--output_dir", str(folder / argv[0])]) == 0
    return folder


@pytest.mark.parametrize("name", ["finetune", "prune", "compress"])
def test_tables_have_the_numbers_of_the_record(runs, name):
    record, tables = record_of(runs / name), Tables((runs / name / "report.html").read_text()).tables
    before, after = record["before"], record["after"]
    rows = {row[0]: [number(cell) for cell in row[1:]] for row in tables["figures"][1:]}
    expected = {"parameters": "parameters", "bytes": "bytes"}
    for label, key in expected.items():
        assert rows[label][:2] == [before[key], after[key]]
        assert rows[label][2] == pytest.approx(after[key] / before[key], rel=1e-5)
    for text, kind in (("the data's kind", "in_domain"), ("other text", "other")):
        for key in ("perplexity", "loss", "tokens_per_second"):
            values = [measured["perplexity"][kind][key] for measured in (before, after)]
            assert rows[f"{key.replace('_', ' ')}, {text}"][:2] == pytest.approx(values, rel=1e-5)
    layers = {row[0]: [number(cell) for cell in row[1:]] for row in tables["layers"][1:]}
    for place, measured in enumerate((before, after)):
        for row in measured["layers"]:
            assert layers[row["name"]][place::2] == [row["parameters"], row["bytes"]]
    if name != "finetune":
        changed = {row[0]: [number(cell) for cell in row[1:]] for row in tables["linear"][1:]}
        after_rows = {row["name"]: row for row in after["linear_layers"]}
        assert changed
        for layer, cells in changed.items():
            row = after_rows[layer]
            assert cells[2:5] == [*row["shape"], row["rank"]] and cells[6:] == [row["parameters"], row["bytes"]]
    if "training" in record:
        steps = {row[0]: row[1] for row in tables["training"][1:]}
        assert number(steps["trainable parameters"]) == record["training"]["trainable_parameters"]


@pytest.mark.parametrize("name", ["finetune", "prune", "compress", "bench"])
def test_page_needs_no_network_and_is_small(runs, name):
    text = (runs / name / "report.html").read_text()
    parsed = Tables(text)
    assert parsed.links == ["data:,"]
    assert set(re.findall(r"https?://[^\s\"<]*", text)) == {"http://www.w3.org/2000/svg"}
    assert len(text) < 200_000


def test_text_of_a_model_or_a_user_is_no_markup(runs):
    text = (runs / "finetune" / "report.html").read_text()
    assert "<img" not in text and "&lt;/script&gt;&lt;img src=x" in text


def test_report_of_a_model_with_thousands_of_experts_stays_small(runs):
    record = record_of(runs / "compress")
    row = record["after"]["linear_layers"][0]
    for when, shift in (("before", 0), ("after", 1)):
        record[when]["linear_layers"] = [
            {**row, "name": f"model.layers.{i // 384}.experts.{i % 384}.down_proj", "shape": [64 + shift, 64]}
            for i in range(48 * 384)
        ]
    text = page(record)
    assert len(text) < 2_000_000
    assert "The first 1000 of 18,432" in text


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("name", ["finetune", "prune", "compress"])
def test_browser_draws_the_plots_without_errors(runs, tmp_path, name, width):
    text = (runs / name / "report.html").read_text()
    changed = tmp_path / "page.html"
    changed.write_text(text.replace("</body>", HOVER + "</body>"))
    argv = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path}",
    ]
    run = subprocess.run(
        [*argv, f"--window-size={width},900", "--dump-dom", changed.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in run.stderr
    parsed = Tables(run.stdout)
    found, charts = json.loads(parsed.texts["found"]), json.loads(parsed.texts["charts"])
    assert not found["wide"]
    assert len(found["tips"]) == len(charts) > 0
    for tip, chart in zip(found["tips"], charts, strict=True):
        # The right end: the last value of each line, or the last bars.
        if chart["kind"] == "lines":
            last = max(x for one in chart["series"] for x, _ in one["points"])
            values = [(one["name"], y) for one in chart["series"] for x, y in one["points"] if x == last]
        else:
            values = [(one["name"], one["values"][-1]) for one in chart["series"]]
        lines = dict(line.rsplit(": ", 1) for line in tip.split("\n")[1:])
        assert {name: number(value) for name, value in lines.items()} == pytest.approx(dict(values), rel=1e-5)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_an_error_in_a_script_would_be_seen(tmp_path):
    (tmp_path / "page.html").write_text("<!doctype html><script>undefined.x</script>")
    argv = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path}",
    ]
    run = subprocess.run(
        [*argv, "--dump-dom", (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=120
    )
    assert "CONSOLE" in run.stderr
