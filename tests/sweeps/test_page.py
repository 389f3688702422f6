"""What the page says, read from its HTML; what hostile names do to it."""

import html
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from tests.sweeps.made_sweep import CLAIMS, CODE, ROWS, FakeStart, make_sweep
from trimpi_jax.io.progress import Progress
from trimpi_jax.sweeps import runner
from trimpi_jax.sweeps.plan import Row
from trimpi_jax.sweeps.runner import Options, run_sweep

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
HOSTILE = "</td><script>document.documentElement.dataset.owned=1</script>{{ 7*7 }}|x"


class Tables(HTMLParser):
    """Section id -> rows of cells; pictures with their texts."""

    def __init__(self, page: str):
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.pictures: list[str] = []
        self._section, self._cell = "", None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if tag == "h2":
            self._section = found["id"]
        elif tag == "tr":
            self.tables.setdefault(self._section, []).append([])
        elif tag in ("td", "th"):
            self._cell = []
        elif tag == "img":
            assert found["src"].startswith("data:image/svg+xml")
            self.pictures.append(found["alt"])

    def handle_endtag(self, tag):
        if tag in ("td", "th") and self._cell is not None:
            self.tables[self._section][-1].append(" ".join("".join(self._cell).split()))
            self._cell = None

    def handle_data(self, data):
        if self._cell is not None:
            self._cell.append(data)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two seeds of depth 4: one run failed, one row with a hostile label was never run."""
    root = tmp_path_factory.mktemp("made") / "sweep"
    rows = (*ROWS, Row("hostile", HOSTILE, "direct_sft"))
    sweep = make_sweep((0, 1), rows=rows, claims=CLAIMS)
    start = FakeStart(root, in_context=2, cot_sft=1, cot_sft_grpo=3)
    start.fails = {"T4-s1-trimpi_poro_grpo": "NonFiniteLoss: <b>rl step 3</b>"}
    quiet = Progress()
    quiet.say = lambda text: None
    options = Options(only="in_context|cot_sft|poro")
    with pytest.MonkeyPatch.context() as patch:  # the page is written once, not after every run
        patch.setattr(runner, "write_page", lambda *given: None)
        assert run_sweep(sweep, root, options, quiet, start, CODE) == 1
    run_sweep(sweep, root, Options(page_only=True), quiet, start, CODE)
    return root


@pytest.fixture(scope="module")
def tables(made):
    return Tables((made / "report.html").read_text()).tables


def rows_of(table):
    return {row[0]: row[1:] for row in table[1:]}


def test_the_main_table_has_our_numbers_the_papers_and_what_was_not_run(tables):
    assert tables["main"][0] == ["method", "Clevr-T, depth 4", "Clevr-T, depth 6"]
    rows = rows_of(tables["main"])
    # both seeds have one of four right: no spread over seeds, so Wilson's interval of 2 of 8
    assert rows["CoT SFT"][0] == "25.0 [7.1, 59.1] paper 49.10 (7B)"
    assert rows["CoT SFT + GRPO"][0] == "75.0 [40.9, 92.9] paper 98.25 (7B)"
    assert rows["CoT SFT"][1] == "not run paper 19.00 (3B), 17.80 (7B)"
    assert rows[HOSTILE] == ["not run paper –", "not run paper –"]


def test_the_verdicts_stand_first_with_interval_and_reason(tables):
    assert next(iter(tables)) == "verdicts"
    first, not_run, growth = tables["verdicts"][1:]
    assert first[:3] == ["RL improves on SFT", "Clevr-T, depth 4", "holds"]
    assert first[3].startswith("+50.0 [+") and first[4] == "2 seeds, over questions"
    assert first[5] == "CoT SFT + GRPO − CoT SFT, without policy, more than 0"
    assert not_run[1:3] == ["Clevr-T, depth 6", "not run"]
    assert not_run[4] == "not run: cot_sft_grpo, cot_sft"
    assert growth[2] == "not run"


def test_a_column_in_full_has_steps_rollouts_seconds_and_seeds(tables):
    rows = rows_of(tables["column_T4"])
    assert rows["CoT SFT + GRPO"][3:] == ["100.0", "8", "24", "4", "2 seeds, over questions"]
    assert rows["TriMPI PoRo-GRPO"][-1] == "1 seed, over questions"
    assert rows[HOSTILE][:3] == ["not run"] * 3


def test_failed_runs_and_shared_stages_are_told(tables):
    rows = rows_of(tables["runs"])
    assert rows["T4-s1-trimpi_poro_grpo"][0] == "failed"
    assert rows["T4-s1-trimpi_poro_grpo"][3] == "NonFiniteLoss: <b>rl step 3</b>"
    assert rows["T4-s0-cot_sft_grpo"][2] == "2_rl"  # what it trained itself
    assert rows["T4-s0-hostile"][0] == "not run"


def test_efficiency_stands_beside_the_papers(tables):
    row = rows_of(tables["efficiency"])["Clevr-T, depth 4"]
    assert row[:3] == ["82.0 / 82.0", "0.0 %", "93.9 %"]


def test_plots_say_what_they_show(made):
    pictures = Tables((made / "report.html").read_text()).pictures
    assert any("CoT SFT + GRPO without policy 75.0 %" in text for text in pictures)
    assert any(text.startswith("T depth 4: -50.0") for text in pictures)  # PoRo - GRPO
    assert any("accuracy of policy-free rollouts" in text for text in pictures)


def test_nothing_that_a_label_says_becomes_markup(made):
    page = (made / "report.html").read_text()
    assert html.escape(HOSTILE, quote=False)[:20] in page and "<script>" not in page
    assert "{{ 7*7 }}" in page and "default-src 'none'" in page
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)


def test_the_markdown_has_the_same_tables(made):
    text = (made / "report.md").read_text()
    assert "| CoT SFT | 25.0 [7.1, 59.1] paper 49.10 (7B) |" in text
    assert "&lt;script>" in text and "\\|x" in text
    widths = {
        line.count(" | ") for line in text.splitlines() if line.startswith("| CoT SFT + GRPO")
    }
    assert len(widths) >= 2  # tables of several widths, each whole


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_browser_shows_it(made, tmp_path):
    picture = tmp_path / "page.png"
    subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,2000"),
            *(f"--screenshot={picture}", f"--user-data-dir={tmp_path / 'user'}"),
            (made / "report.html").as_uri(),
        ],
        check=True,
        capture_output=True,
        timeout=60,
    )
    assert picture.stat().st_size > 20_000
