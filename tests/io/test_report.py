"""The page: what it says, and what hostile texts and bad folders do to it."""

import base64
import contextlib
import hashlib
import html
import http.server
import json
import re
import shutil
import subprocess
import threading
from html.parser import HTMLParser

import pytest

from tests.io.made_runs import make_examples, make_record, write_run
from trimpi_jax import report
from trimpi_jax.evaluators.questions import summarize
from trimpi_jax.io.gallery import choose_questions, first_departure, make_gallery
from trimpi_jax.io.paper_figures import FIGURES, method_of, task_of
from trimpi_jax.io.report import paper_section, render_page, write_report
from trimpi_jax.io.results import (
    compare_records,
    comparison_text,
    load_run,
    load_runs,
    stage_label,
    suite_rows,
)

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

OWNED = "document.documentElement.dataset.owned=1;console.error('owned')"
HOSTILE = (
    f'"\'><script>{OWNED}</script><img src=http://evil.example/a.png onerror="{OWNED}">'
    f"</pre></style></script><svg onload=\"{OWNED}\"><style>@import 'http://evil.example/b.css';"
    f'</style><iframe src="http://evil.example/c"></iframe><a href="javascript:{OWNED}">x</a>'
    "<!-- {{ 7 * 7 }} {% raw %} &lt;b&gt; ]]> $\\frac{a}{$ \u202eabc\u2066 \u0000\u0007"
)


class Texts(HTMLParser):
    """All text between tags, and all tags with their attributes."""

    def __init__(self, page: str):
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


def test_two_runs_stand_side_by_side(tmp_path):
    one = write_run(tmp_path / "one", name="first")
    two = write_run(tmp_path / "two", name="second", rights=(1, 2))
    page = tmp_path / "page.html"
    write_report([one, two], page)
    seen = Texts(page.read_text())
    assert "first, second" in seen.text
    assert "B +PoRo-GRPO 50.0 (2/4)" in seen.text
    # paired with the base that reads the policy (4 of 4): one question lost, none won
    assert (
        "A +PoRo-GRPO 75.0 (3/4) [30.1, 95.4] 100.0 (4/4) [51.0, 100.0] -25.0 points" in seen.text
    )
    assert "(+0 −1 of 4, p = 1.000)" in seen.text
    # 2 runs x 2 models x 2 views of the same 4 questions, which share 4 pictures
    answers = [attrs for tag, attrs in seen.tags if attrs.get("class") == "answer"]
    pictures = [a for tag, a in seen.tags if tag == "img" and "test question" in (a["alt"] or "")]
    assert (len(answers), len(pictures)) == (32, 4)
    assert sum(a["data-verdict"] == "wrong" for a in answers) == 3 + 1 + 3 + 2


def test_every_picture_has_a_text_and_nothing_is_loaded(tmp_path):
    seen = Texts(render_page(load_runs([write_run(tmp_path / "run")]), gallery=4))
    pictures = [attrs for tag, attrs in seen.tags if tag == "img"]
    assert len(pictures) == 4 + 1 + 2  # questions, overview, reward and accuracy
    for attrs in pictures:
        assert (attrs["alt"] or "").strip() and (attrs["src"] or "").startswith("data:image/")
    for tag, attrs in seen.tags:
        assert not {"style", "onclick", "onload", "onerror"} & attrs.keys()
        assert tag != "link" and (attrs.get("href") or "#").startswith("#")
    policy = next(a["content"] for t, a in seen.tags if t == "meta" and "http-equiv" in a)
    own = {
        tag: re.search(f"<{tag}>(.*?)</{tag}>", "".join(_page(tmp_path)), re.S)
        for tag in ("style", "script")
    }
    for found in own.values():  # the policy names just the page's own style and script
        digest = base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def _page(tmp_path):
    return render_page(load_runs([tmp_path / "run"]), gallery=4)


@pytest.fixture
def hostile_page(tmp_path):
    examples = make_examples(
        query=HOSTILE, answer=HOSTILE, cot=HOSTILE, policy_name=HOSTILE, example_id=HOSTILE
    )
    run = write_run(
        tmp_path / 'run"><b onclick=1>',
        examples=examples,
        said=HOSTILE,
        name=HOSTILE,
        method=HOSTILE,
        model_dir=HOSTILE,
        data={"dataset": HOSTILE, "variant": HOSTILE, "policies": HOSTILE},
    )
    folder = run / "3_rl" / "evaluation"
    folder.mkdir()
    records = [{"example_id": e.example_id, "anatomy": {"cause": HOSTILE}} for e in examples]
    suite = {"identity": {}, "summary": {}, "records": records, "lines": [[HOSTILE, HOSTILE]]}
    (folder / "anatomy.json").write_text(json.dumps(suite))
    page = tmp_path / "page.html"
    write_report([run, run], page)
    return page


def test_hostile_text_is_text(hostile_page):
    seen = Texts(hostile_page.read_text())
    assert {tag for tag, _ in seen.tags} & {"svg", "iframe", "b"} == set()
    assert sum(tag == "script" for tag, _ in seen.tags) == 1
    assert "<script>document.documentElement" in seen.text  # as text


@needs_chromium
def test_hostile_text_does_nothing_in_a_browser(hostile_page, tmp_path):
    dom, log, requests = _browse(hostile_page, tmp_path)
    assert "questions, " in dom  # the page's own script ran ...
    assert "data-owned" not in re.findall(r"<html[^>]*>", dom)[0]  # ... and no other
    assert not [line for line in log.splitlines() if "CONSOLE" in line]
    assert requests == []
    shown = html.unescape(re.sub(r"<[^>]*>", " ", dom))
    assert "onerror=" in shown and "{{ 7 * 7 }}" in shown


@needs_chromium
def test_the_browser_test_would_notice(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(f"<!doctype html><html><body>{HOSTILE.replace(chr(0), '')}</body></html>")
    dom, log, requests = _browse(page, tmp_path)
    assert "data-owned" in re.findall(r"<html[^>]*>", dom)[0]
    assert "owned" in log and "CONSOLE" in log
    assert any("a.png" in line for line in requests)


@needs_chromium
def test_filters_choose_answers(tmp_path):
    page = tmp_path / "page.html"
    write_report([write_run(tmp_path / "run")], page)
    # the page's policy lets no second script in, so this one stands in a copy without it
    text = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text())
    choose = (
        "<script>const f=document.getElementById('filters').elements;f.verdict.value='wrong';"
        "f.model.value='+PoRo-GRPO';"
        "f.verdict.dispatchEvent(new Event('input',{bubbles:true}))</script>"
    )
    (tmp_path / "copy.html").write_text(text.replace("</body>", choose + "</body>"))
    dom, _, _ = _browse(tmp_path / "copy.html", tmp_path)
    assert "1 of 4 questions, 1 answers" in dom
    assert dom.count("<article") == 4 and len(re.findall("<article[^>]* hidden", dom)) == 3


def _browse(page, tmp_path) -> tuple[str, str, list[str]]:
    """(the page after its scripts, the browser's log, what was asked of any server)."""
    asked: list[str] = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.requestline)
            self.send_error(404)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with contextlib.closing(server.socket):
        done = subprocess.run(
            [
                str(CHROMIUM),
                *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
                *("--disable-background-networking", "--disable-component-update"),
                "--disable-features=NetworkTimeServiceQuerying",  # the browser's own clock
                "--enable-logging=stderr",
                f"--user-data-dir={tmp_path / 'profile'}",
                # every name leads to the server above
                f"--host-resolver-rules=MAP * 127.0.0.1:{server.server_port}",
                *("--virtual-time-budget=2000", "--dump-dom", page.as_uri()),
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
        server.shutdown()
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr, asked


def test_comparison_by_hand():
    names = make_examples()
    before = [make_record(example, number < 3) for number, example in enumerate(names)]
    after = [make_record(example, number > 2) for number, example in enumerate(names)]
    found = compare_records(before, after)
    # three lost, one won: P(X <= 1 or X >= 3 of 4 coins) = 2 (1 + 4) / 16
    assert found == {"count": 4, "gained": 1, "lost": 3, "points": -50.0, "p": pytest.approx(0.625)}
    assert comparison_text(found) == "-50.0 points (+1 −3 of 4, p = 0.625)"
    assert compare_records(before, []) is None


def test_departure_is_the_first_line_that_differs():
    gold = "a\nb\nc"
    assert first_departure("<think>a\nx\nc</think>", gold) == {"line": 2, "said": "x", "gold": "b"}
    assert first_departure("<think>a\nb", gold) == {"line": 3, "said": "(nothing)", "gold": "c"}
    assert first_departure("<think>a\nb\nc</think>", gold) is None
    assert first_departure("a", gold) is None and first_departure("<think>a</think>", "") is None


def test_gallery_is_half_wrong_where_there_are_enough(tmp_path):
    run = load_run(write_run(tmp_path / "run", rights=(1, 2)))
    chosen = choose_questions(run, 2)
    wrong = {r["example_id"] for r in run.models[-1].records["policy_free"] if r["accuracy"] < 1}
    assert len(chosen) == 2 and len(chosen & wrong) == 1
    assert len(choose_questions(run, 100)) == 4
    assert make_gallery([run], 0) == []


def test_paper_stands_beside_where_the_task_is_the_same(tmp_path):
    depth = {"dataset": "clevr_policy", "variant": "T", "depth": 6}
    run = load_run(write_run(tmp_path / "run", data=depth, stages=["vm_cpt", "cot_sft", "rl"]))
    assert task_of(run.config) == ("clevr_policy", "T", 6)
    assert method_of(("vm_cpt", "cot_sft", "rl"), run.config["rl"]) == "trimpi_poro_grpo"
    assert method_of(("cot_sft", "rl"), {"objective": "dapo"}) == "cot_sft_dapo"
    assert (
        method_of(("cot_sft", "rl"), {"policy_rollout": True}) not in FIGURES[task_of(run.config)]
    )
    section = paper_section([run])
    assert section["rows"][0] == [
        "in context, no training",
        "100.0 (4/4) [51.0, 100.0]",
        "4.80",
        "13.15",
        "90.10",
    ]
    other = load_run(write_run(tmp_path / "other", data={"dataset": "own"}))
    assert paper_section([other]) is None


def test_labels_name_the_objective(tmp_path):
    assert (
        stage_label(tmp_path / "3_rl", {"objective": "dapo", "policy_rollout": True})
        == "+PoRo-DAPO"
    )
    assert stage_label(tmp_path / "2_rl", {}) == "+GRPO"
    assert stage_label(tmp_path / "1_vm_cpt", {}) == "+VM-CPT"


def test_results_of_an_evaluation_are_a_run_too(tmp_path):
    run = write_run(tmp_path / "run")
    records = [make_record(example, True) for example in make_examples()]
    out = tmp_path / "out"
    out.mkdir()
    suite = {"identity": {}, "summary": summarize(records), "records": records}
    (out / "main.json").write_text(json.dumps(suite | {"lines": [["right", "4"]]}))
    (out / "recital.json").write_text(json.dumps(suite | {"lines": [["rules", "93 %"]]}))
    about = {"model": "/some/model", "config": "nano", "data": str(run / "data")}
    (out / "results.json").write_text(json.dumps(about))
    runs = load_runs([out])
    assert suite_rows(runs) == (["evaluation", "model"], [["recital: rules", "93 %"]])
    seen = Texts(render_page(runs, gallery=4))
    assert "model 100.0 (4/4)" in seen.text and "recital: rules" in seen.text
    assert sum(attrs.get("class") == "answer" for _, attrs in seen.tags) == 4


def test_bad_folders_are_all_named(tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = write_run(tmp_path / "broken")
    (broken / "3_rl" / "evaluation.json").write_text("{")
    early = tmp_path / "early"
    early.mkdir()
    (early / "config.json").write_text("{}")
    out = tmp_path / "page.html"
    folders = [str(tmp_path / "none"), str(empty), str(broken), str(early)]
    with pytest.raises(SystemExit) as stopped:
        report.main([*folders, "--out", str(out)])
    message = str(stopped.value)
    for words in (
        "none is not a folder",
        "empty has neither",
        "is not JSON",
        "nothing has been evaluated",
    ):
        assert words in message
    assert not out.exists()
    good = str(write_run(tmp_path / "good"))
    with pytest.raises(SystemExit, match="gallery must be >= 0"):
        report.main([good, "--out", str(out), "--gallery", "-1"])
    with pytest.raises(SystemExit, match="No such file"):
        report.main([good, "--out", str(tmp_path / "nowhere" / "page.html")])
    report.main([good, "--out", str(out)])
    assert str(out) in capsys.readouterr().out
