"""The page about a run: self-contained, escaped, readable; and about runs that are unfinished or odd."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import toolkit
from tests.conftest import WORDS
from toolkit.pages import page, report
from toolkit.pages.pictures import Line, Picture, draw, thinned
from toolkit.records.history import read_run

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
HOSTILE = "</p><script>document.title='hacked'</script><img src=http://evil.example/x onerror=alert(1)>"


class Page(HTMLParser):
    """What a browser would find: elements with their attributes, and the text."""

    def __init__(self, file: Path):
        super().__init__()
        self.html = file.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be changed."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | values))


def assert_self_contained(file: Path) -> Page:
    found = Page(file)
    assert found.open == []
    assert file.stat().st_size < 2_000_000
    tags = {tag for tag, _ in found.elements}
    assert not tags & {"script", "iframe", "object", "embed", "form", "base", "a", "img"}
    for tag, attributes in found.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href", "action", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith("#") or (tag, value) == ("link", "data:,")
    policy = next(a["content"] for t, a in found.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    assert "url(" not in found.html.replace("url(#", "") and "@import" not in found.html
    ids = [a["id"] for _, a in found.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for tag, attributes in found.elements:
        if tag == "svg":
            assert attributes["role"] == "img"
            assert attributes["aria-labelledby"] in ids
    return found


def test_training_leaves_a_page_and_pictures(finished_run: Path) -> None:
    found = assert_self_contained(finished_run / "report.html")
    assert sorted(file.name for file in (finished_run / "report").iterdir()) == [
        *(
            f"dpo-{name}.png"
            for name in ("accuracy", "kl", "learning-rate", "lengths", "logps", "loss", "margin", "rewards")
        ),
        *(f"sft-{name}.png" for name in ("learning-rate", "lengths", "loss", "rewards", "token-accuracy")),
    ]
    for file in (finished_run / "report").iterdir():
        assert file.read_bytes().startswith(b"\x89PNG")
    assert len([tag for tag, _ in found.elements if tag == "svg"]) == 13
    for text in (
        "base + sft adapter (frozen) + new adapter",
        "base + sft adapter (the new adapter disabled)",
        "policy equals reference to 0.0e+00",
        "learning_rate: 0.01",
        "tokens per second",
        "peak memory",
        json.loads((finished_run / "dpo" / "stage.json").read_text())["adapter_digest"],
    ):
        assert text in found.text


def test_the_page_names_no_place_on_this_machine(finished_run: Path, base: Path) -> None:
    html = (finished_run / "report.html").read_text(encoding="utf-8")
    assert str(base.parent) not in html
    assert str(finished_run.parent) not in html
    assert str(Path.cwd()) not in html


def test_pictures_say_what_was_logged(finished_run: Path) -> None:
    lines = [json.loads(line) for line in (finished_run / "dpo" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    found = Page(finished_run / "report.html")
    said = f"dpo: Loss, over optimizer steps: training from {losses[0]:.4g} to {losses[-1]:.4g}"
    assert said in found.text


def test_every_picture_is_whole_and_has_the_colours_of_the_page(finished_run: Path) -> None:
    html = (finished_run / "report.html").read_text(encoding="utf-8")
    pictures = [part.split("</figure>")[0] for part in html.split('<figure id="')[1:]]
    for picture in pictures:
        svg = ElementTree.fromstring(picture[picture.index("<svg") :])
        assert svg.findtext("title")
        assert "currentColor" in picture and "var(--c" in picture
        assert "#000000" not in picture and "white" not in picture


def test_lengths_are_those_of_the_rows(finished_run: Path) -> None:
    sft, dpo = json.loads((finished_run / "resolved.json").read_text())["stages"]
    assert sum(sft["token_lengths"]["counts"]["row"]) == sft["rows"]["rows"] == 12
    assert sft["token_lengths"]["mean"]["row"] * 12 == pytest.approx(sft["rows"]["tokens"], abs=1)
    mean = dpo["token_lengths"]["mean"]
    assert 12 * (mean["chosen"] + mean["rejected"]) == pytest.approx(dpo["rows"]["supervised"], abs=2)
    assert len(dpo["token_lengths"]["edges"]) == len(dpo["token_lengths"]["counts"]["prompt"]) + 1


def test_what_a_model_says_is_shown_and_not_run(run: Path) -> None:
    long = "é" * 50_000
    samples = [
        {"prompt": HOSTILE, "answers": {"base": HOSTILE, "sft": "half \ud800", "dpo": long}, "sampled": {"base": ""}}
    ]
    change(run / "evaluation.json", samples=samples)
    found = assert_self_contained(report.write(run))
    assert found.text.count(HOSTILE) == 2
    assert "half ?" in found.text
    assert f"{long[:4000]} … (46,000 characters more)" in found.text
    assert "(empty)" in found.text


def test_differences_are_marked_word_by_word() -> None:
    assert page.marked(None, "the sun") == [(False, "the sun")]
    assert page.marked("the sun is red", "the moon is red now") == [
        (False, "the"),
        (True, " moon"),
        (False, " is red"),
        (True, " now"),
    ]
    assert page.marked("same", "same") == [(False, "same")]
    assert page.marked("gone", "") == []


def test_intervals_and_shares_are_written_out() -> None:
    measured = {"value": 0.975, "low": 0.95, "high": 1.0, "n": 40}
    models = {
        "base": {"reference": None, "perplexity": {"value": 12.345, "low": 11.0, "high": 14.0}, "kl": None},
        "dpo": {"reference": "sft", "preference": {"accuracy": measured, "beta": 0.1, "quantiles": {}}, "kl": 0.25},
    }
    assert report.measures({"models": models}) == (
        ["base", "dpo"],
        [
            ("compared with", ["", "sft"]),
            ("preference accuracy", ["", "97.5% (95.0% to 100.0%)"]),
            ("KL to the model compared with, nats per token", ["", "0.25"]),
            ("perplexity of held-out answers", ["12.3 (11 to 14)", ""]),
        ],
    )
    assert report.measures({"scores": {"right": {"base": 0.5, "sft": None}}}) == (
        ["base", "sft"],
        [("right", ["50.0%", ""])],
    )
    assert report.measures({}) == ([], [])


def test_guards_findings_and_rewards_are_shown_where_recorded(run: Path) -> None:
    text = "the KL to the reference is 0.61 nats per token; raise beta"
    change(run / "dpo" / "stage.json", guards=[{"step": 20, "guard": "kl", "text": text}], stopped={"step": 20})
    change(run / "findings.json", dpo=[{"level": "warning", "where": "/home/a/r.yaml:3: data", "text": "12 twice"}])
    change(run / "dpo" / "evaluation.json", rewards={"chosen": [0.5, None, 1.0], "rejected": [-1.0, 0.0]})
    found = assert_self_contained(report.write(run))
    assert f"step 20: {text}" in found.text
    assert "training was stopped at step 20" in found.text
    assert "warning: r.yaml:3: data: 12 twice" in found.text
    assert "dpo: Rewards of held-out pairs, over nats: chosen 2 from 0.5 to 1; rejected 2 from -1" in found.text


def test_before_the_last_stage_what_is_measured_is_shown(run: Path) -> None:
    (run / "evaluation.json").unlink()
    (run / "dpo" / "evaluation.json").unlink()
    change(run / "base" / "evaluation.json", summary={"perplexity": {"value": 31.5}})
    change(run / "sft" / "evaluation.json", summary={"perplexity": {"value": 12.25}})
    assert read_run(run).evaluation["models"].keys() == {"base", "sft"}
    assert re.search(r"perplexity of held-out answers\s*31.5\s*12.2", Page(report.write(run)).text)


def test_findings_of_the_checks_are_kept(finished_run: Path) -> None:
    told = json.loads((finished_run / "findings.json").read_text())
    assert {"tokenizer", "sft", "dpo"} <= set(told)
    assert f"{told['sft'][0]['level']}: " in Page(finished_run / "report.html").text


def test_an_unfinished_run_has_a_page(run: Path) -> None:
    for file in run.rglob("evaluation.json"):
        file.unlink()
    (run / "dpo" / "stage.json").unlink()
    lines = (run / "dpo" / "metrics.jsonl").read_text().splitlines()
    (run / "dpo" / "metrics.jsonl").write_text("\n".join(lines[:2]) + '\n{"step": 3, "lo')
    found = assert_self_contained(report.write(run))
    assert "step 1 of 3" in found.text
    assert "Not measured" in found.text
    shutil.rmtree(run / "dpo")
    found = assert_self_contained(report.write(run))
    assert "not run" in found.text
    assert "Nothing was logged." in found.text or "dpo: Length of the training rows" in found.text
    assert not (run / "report" / "dpo-loss.png").exists()


def test_numbers_that_are_none_and_thousands_of_steps(run: Path) -> None:
    with (run / "dpo" / "metrics.jsonl").open("w") as stream:
        for step in range(20_000):
            loss: Any = 9.5 if step == 7_777 else None if step % 3 else step / 20_000
            stream.write(json.dumps({"step": step, "loss": loss, "rewards/margins": float("nan"), "kl": "x"}) + "\n")
    found = assert_self_contained(report.write(run))
    assert "highest 9.5" in found.text
    assert "Reward margin" not in found.text  # nothing in it is a number


def test_spikes_survive_thinning() -> None:
    points = [(float(i), 1.0) for i in range(10_000)]
    points[4_321] = (4321.0, 50.0)
    kept = thinned(points, 200)
    assert len(kept) <= 200
    assert (4321.0, 50.0) in kept
    assert thinned(points[:150], 200) == points[:150]


def test_a_strange_name_is_only_a_name(run: Path) -> None:
    resolved = json.loads((run / "resolved.json").read_text())
    (run / "dpo").rename(run / "_a b<i>$x$&amp;")
    resolved["stages"][1]["name"] = "_a b<i>$x$&amp;"
    resolved["stages"].append({"name": ".."})
    (run / "resolved.json").write_text(json.dumps(resolved))
    found = assert_self_contained(report.write(run))
    assert "_a b<i>$x$&amp;: Loss, over optimizer steps" in found.text
    assert (run / "report" / "_a_20_b_3c_i_3e__24_x_24__26_amp_3b_-loss.png").is_file()


def test_a_name_in_a_legend_may_look_like_markup() -> None:
    lines = [Line("_<b>$1$", [(0.0, 1.0), (1.0, 2.0)]), Line("b", [(0.0, float("nan")), (1.0, 2.0)], 1)]
    svg = draw(Picture("p", "t", "x", "y", lines), png=False).svg
    assert "_&lt;b&gt;$1$" in svg
    assert "<b>" not in svg


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(toolkit.RunError, match=r"is not a run directory; expected one that `toolkit train` made"):
        report.write(tmp_path)
    with pytest.raises(toolkit.RunError, match="no such directory"):
        report.write(tmp_path / "nothing")
    (tmp_path / "resolved.json").write_text("[1, 2]")
    with pytest.raises(toolkit.RunError, match="cannot be read"):
        report.write(tmp_path)


def test_a_bare_run_directory_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "resolved.json").write_text("{}")
    assert_self_contained(report.write(tmp_path))
    assert read_run(tmp_path).stages == []


def test_a_report_that_fails_fails_no_run(
    recipe: dict[str, Any], write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "report.html").mkdir(parents=True)
    (tmp_path / "run" / "resolved.json").write_text('{"older": true}')
    del recipe["stages"][1]
    result = toolkit.train(write(recipe), output=tmp_path / "run")
    assert result.adapter is not None
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith("report: not written: ")
    assert said[-1].endswith(f"; `toolkit report {tmp_path / 'run'}` tries again")


def test_a_stage_may_not_take_the_place_of_the_report(recipe: dict[str, Any], write: Any) -> None:
    recipe["stages"][0]["name"] = "report"
    with pytest.raises(toolkit.RecipeError, match="'report' has a meaning of its own in a run"):
        toolkit.load_recipe(write(recipe))


def test_the_templates_of_pages_are_no_chat_templates(recipe: dict[str, Any], write: Any, tmp_path: Path) -> None:
    recipe["model"]["chat_template"] = "report.html"
    with pytest.raises(toolkit.ModelError, match=r"no template is named 'report.html'; expected .*: chatml") as caught:
        toolkit.train(write(recipe), output=tmp_path / "run")
    assert "compare.html" not in str(caught.value)


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., str]:
    """Open a page in headless Chromium and return what it prints. It has to have no complaint."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", "--hide-scrollbars", "--window-size=400,4000"]

    def open_(file: Path, *flags: str) -> str:
        shown = subprocess.run(
            [*command, *flags, file.as_uri()], check=True, capture_output=True, text=True, timeout=120
        )
        assert "CONSOLE" not in shown.stderr  # errors, and requests that the page's policy refused, are reported there
        return shown.stdout

    return open_


@pytest.mark.parametrize(("dark", "paper"), [(False, (255, 255, 255)), (True, (20, 23, 26))])
def test_a_browser_draws_the_page_light_and_dark(
    run: Path, tmp_path: Path, browse: Callable[..., str], dark: bool, paper: tuple[int, int, int]
) -> None:
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    browse(report.write(run), f"--screenshot={tmp_path / 'page.png'}", *scheme)
    from PIL import Image

    with Image.open(tmp_path / "page.png") as image:
        colours = image.convert("RGB").getcolors(image.width * image.height)
    assert max(colours)[1] == paper
    assert len(colours) > 50  # curves, marks and text in their own colours, with soft edges


def test_on_a_phone_nothing_is_cut_off_and_what_a_model_says_is_text(run: Path, browse: Callable[..., str]) -> None:
    change(run / "evaluation.json", samples=[{"prompt": WORDS[0], "answers": {"base": HOSTILE, "sft": "x" * 500}}])
    html = report.write(run).read_text(encoding="utf-8")
    policy = re.search(r"<meta http-equiv[^>]*>", html)
    assert policy is not None
    measure = """<script>parent.document.title = `${document.title}: ${document.documentElement.scrollWidth} pixels,
        ${document.querySelectorAll("script, img").length} script`</script>"""
    inside = escape(html.replace(policy[0], "") + measure)
    (run / "phone.html").write_text(f'<title>-</title><iframe width=360 srcdoc="{inside}"></iframe>', encoding="utf-8")
    assert re.search(r"<title>run: 360 pixels,\s+1 script</title>", browse(run / "phone.html", "--dump-dom"))
