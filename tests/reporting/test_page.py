"""What the pages say, and that nothing in them has an effect or is loaded from elsewhere."""

import dataclasses
import html
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import reported_run
from mlflow import MlflowClient

from eiwtrain import report
from eiwtrain.config.file import load_config
from eiwtrain.reporting import charts, comparison, facts, page
from eiwtrain.reporting.charts import Series
from eiwtrain.reporting.comparison import worker_hours
from eiwtrain.reporting.markup import el
from eiwtrain.reporting.recorded import Point
from eiwtrain.scoring.published import Figure, Published
from eiwtrain.storage.holdings import Holding
from eiwtrain.tracking import curves

EVIL = "<script>alert('1')</script>\"onload='x"
VOID = {"meta", "img", "br"}
KNOWN = set(
    re.findall(
        r"\w+",
        "html head meta title style body main header section h1 h2 p div span b i ul li dl dt dd table thead tbody tr "
        "th td figure figcaption img svg line text path circle code pre details summary",
    )
)


class Page(HTMLParser):
    """A page as a browser takes it: its text, and every tag with its attributes."""

    def __init__(self, text):
        super().__init__()
        self.text, self.tags, self.open = "", [], []
        self.feed(text)
        self.close()
        assert not self.open, "each element ends"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def check_nothing_is_loaded(parsed):
    """Check that a page has only elements of ours, and that pictures are its only sources."""
    assert {tag for tag, _ in parsed.tags} <= KNOWN
    for tag, attributes in parsed.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name not in ("href", "srcset", "action", "data", "xlink:href", "poster"), (tag, name)
            if name == "src":
                assert value.startswith("data:image/webp;base64,")
            elif name == "style":
                assert re.fullmatch(r"width:[\d.]+%", value)
    assert not re.search(r"@import|url\(", parsed.text)
    assert any(
        attributes.get("http-equiv") == "Content-Security-Policy"
        and attributes["content"].startswith("default-src 'none'")
        for tag, attributes in parsed.tags
        if tag == "meta"
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory, database):
    """Two runs of one folder: `a`, which cost money, and `b` of another learning rate."""
    folder = tmp_path_factory.mktemp("runs")
    for name, fields in (("a", {"workers": {"price_per_hour": 0.9}}), ("b", {"train": {"lr": 0.25}})):
        reported_run.train(reported_run.begin(folder, database, name, **fields), workers=len(name))
    return folder / "runs"


@pytest.fixture(scope="module")
def run(runs):
    return facts.gather(str(runs / "a"))


def test_a_page_says_what_is_known_and_loads_nothing(run):
    parsed = Page(page.render(run))
    check_nothing_is_loaded(parsed)
    for said in (
        "photos (patches)", "12,345 parameters", "finished", "step 12 of 12", "4.0000 ± 0.0100", "60%",
        "its workers failed: rank 1 died", "SIGTERM", "1 restart of the workers", "the command",
        "python -m eiwtrain.run config.yaml run.name=a-again", "lr: 0.001", "Cost of all jobs: 1.50, of which 1.00",
        "no figure is comparable", "2 levels of 2 steps", "python -m eiwtrain.export best --run",
    ):  # fmt: skip
        assert said in parsed.text, said
    pictures = [attributes["alt"] for tag, attributes in parsed.tags if tag == "img"]
    assert pictures == ["samples, step 6", "samples, step 12"]


def test_the_config_of_a_page_starts_a_run_like_it(run, tmp_path):
    text = html.unescape(re.findall(r"<pre>(.*?)</pre>", page.render(run), re.DOTALL)[-1])
    (tmp_path / "config.yaml").write_text(text)
    again = load_config(str(tmp_path / "config.yaml"), ["run.name=a"])
    assert again.model_dump(mode="json") == run.config


def test_names_of_strangers_have_no_effect(tmp_path, database):
    config = reported_run.begin(tmp_path, database, command=EVIL)
    named = config.model_dump(mode="json")
    named["run"]["name"] = EVIL
    named["train"][EVIL] = EVIL
    state = {"config": named, "data": EVIL, "data_fingerprint": EVIL, "class_names": [EVIL, "\u202etac", "\ud800"]}
    reported_run.train(config, **state)
    (Path(config.root) / "checkpoints" / "step-00000020-00000000").mkdir()
    (Path(config.root) / "checkpoints" / "step-00000020-00000000" / "manifest.json").write_text(EVIL)
    client = MlflowClient(f"sqlite:///{config.run.storage}/mlflow.db")
    (found,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    client.set_tag(found.info.run_id, "mlflow.source.git.commit", EVIL)
    run = facts.gather(config.root)
    other = dataclasses.replace(run, fields={"train.lr": EVIL}, name="other", root=EVIL)
    for text in (page.render(run), comparison.render([run, other])):
        parsed = Page(text)
        check_nothing_is_loaded(parsed)
        assert EVIL in parsed.text
        assert "\u202e" not in text
        text.encode()


@pytest.mark.parametrize("state", ["begun", "killed", "bare"])
def test_a_run_in_any_state_has_a_page(tmp_path, database, run, state):
    if state == "begun":
        config = reported_run.begin(tmp_path, database)
        shown = page.render(facts.gather(config.root))
        assert "no step made yet" in shown
        assert "train.max_steps=12" in shown
        assert "SIGTERM" in shown
    elif state == "killed":
        running = (*run.holdings[:1], Holding(100.0, 200.0, "running"))
        shown = page.render(dataclasses.replace(run, holdings=running))
        assert "without a sign of life since 1970-01-01 00:03:20 UTC" in shown
    else:
        bare = dataclasses.replace(
            run, config=None, fields={}, holdings=(), time=None, cost=None, curves={}, best=None, flow=None,
            construction="", estimator=None, parameters=None, manifest=None, recorded=facts.Recorded(), images=None,
            notes=("MLflow is away",),
        )  # fmt: skip
        shown = page.render(bare)
        assert "no points" in shown
        assert "MLflow is away" in shown
    check_nothing_is_loaded(Page(shown))


def test_secrets_of_urls_are_hidden():
    assert "secret" not in el("p", "run with http://me:secret@host/x", title="s3://k:secret@b/x")


def test_a_comparison_lists_the_fields_that_differ_and_no_others(runs):
    compared = [facts.gather(str(runs / name)) for name in ("a", "b")]
    assert comparison.differing(compared) == {
        "train.lr": ["0.001", "0.25"],
        "workers.price_per_hour": ["0.9", "None"],
    }
    parsed = Page(comparison.render(compared))
    check_nothing_is_loaded(parsed)
    assert "do not compare" not in parsed.text
    assert sum(tag == "svg" for tag, _ in parsed.tags) == 4
    assert "worker-hours" in parsed.text
    gpus = [dataclasses.replace(r, fields=r.fields | {"workers.gpus": "1"}) for r in compared]
    assert "by GPU-hours" in comparison.render(gpus)
    other = dataclasses.replace(compared[1], fingerprint="0" * 64)
    assert "Bits/dim of these runs do not compare: they differ in data set." in comparison.render([compared[0], other])


def test_runs_of_one_name_are_told_apart_by_their_folders(run):
    shown = Page(comparison.render([run, dataclasses.replace(run, root="/elsewhere/a")]))
    assert "No field differs." in shown.text
    assert shown.text.count("/elsewhere/a") > 2


def test_hours_of_workers_count_every_job_by_its_own_workers():
    jobs = [Holding(0.0, 3600.0, "died"), Holding(7200.0, 10800.0, "finished")]
    points = [Point(step, hour * 3600, float(step)) for step, hour in ((1, 0.5), (2, 0.75), (3, 2.5), (4, 3.0))]
    workers = [Point(1, 1800, 4.0), Point(3, 9000, 2.0)]
    assert worker_hours(points, workers, jobs, 1) == [
        (2.0, 1.0),  # half an hour of four
        (3.0, 2.0),
        (5.0, 3.0),  # the quarter of an hour that was lost, and half an hour of two
        (6.0, 4.0),
    ]
    assert worker_hours(points, [], jobs, 3)[-1] == (6.0, 4.0)
    assert worker_hours(points, [], [], 3)[-1] == (0.0, 4.0)


def test_long_curves_are_drawn_as_means_and_say_so():
    points = [(float(x), 5.0 + (x % 2)) for x in range(4800)]
    shown = charts.line_chart("t", [Series("s", points)], "steps")
    assert shown.count("L") == 239
    assert "each point of s is the mean of 20" in shown
    assert {y for _, y in charts.thin(points)} == {5.5}


def test_values_far_above_the_others_are_cut_off_and_that_is_said():
    points = [(float(x), 4.0 + x % 10 / 10) for x in range(200)]
    assert "drawn at the top" not in charts.line_chart("t", [Series("s", points)], "steps")
    shown = charts.line_chart("t", [Series("s", [(0.0, 1e6), *points])], "steps")
    assert "values above 4.9 are drawn at the top" in shown
    places = [float(y) for y in re.findall(r"[ML][\d.]+ (-?[\d.]+)", shown)]
    assert min(places) >= 0


@pytest.mark.parametrize(
    "points", [[(0.0, 0.0)], [(5.0, 1e299), (5.0, -1e299)], [(1e14, 1e17), (1e14, 1e17 + 64)], [(0.0, 1e-300)] * 3]
)
def test_any_numbers_can_be_drawn(points):
    assert "nan" not in charts.line_chart("t", [Series("s", points, marked=True)], "steps", [("PNG", 5.0)])


def test_the_command_writes_the_page(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    output = tmp_path / "new" / "page.html"
    assert report.main([str(runs / "a"), "--output", str(output)]) == 0
    check_nothing_is_loaded(Page(output.read_text()))
    assert report.main(["a", "b", "--storage", str(runs), "--output", str(output), "--overwrite"]) == 0
    assert "Comparison of 2 runs" in output.read_text()
    assert list(output.parent.iterdir()) == [output]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["none"], "runs/none: there is no run"),
        (["a", "a"], "is given twice"),
        (["a", "--output", "there.html"], "there.html is there already"),
        (["a", "--output", "page.pdf"], "does not end in .html"),
        (["a", "--output", "folder.html", "--overwrite"], "this is a folder"),
        (["a", "--tracking-uri", "sqlite:////none/mlflow.db"], "--tracking-uri: /none/mlflow.db is not there"),
        (["a", "--tracking-uri", "http://me:secret@host"], "--tracking-uri: a password in a URL"),
    ],
)
def test_what_cannot_be_used_is_one_line(runs, tmp_path, monkeypatch, capsys, words, why):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    Path("there.html").write_text("mine")
    Path("folder.html").mkdir()
    assert report.main([*words, "--storage", str(runs)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert why in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.html", "there.html"]
    assert Path("there.html").read_text() == "mine"


def test_each_curve_of_the_page_exists():
    assert {curve for *_, curve in page._CHARTS} <= set(curves.MEANINGS)


def test_published_figures_stand_beside_the_score_where_they_compare(run):
    figures = tuple(Figure(EVIL, "CIFAR-10", "ELBO", size, 3.25, "arXiv 1") for size in (None, 7_000_000))
    shown = Page(page.render(dataclasses.replace(run, published=Published(figures))))
    check_nothing_is_loaded(shown)
    assert shown.text.count(f"{EVIL}3.25ELBO") == 2
    assert "7,000,000arXiv 1" in shown.text
    assert "a4.0000 ± 0.0100ELBO12,345this run" in shown.text
