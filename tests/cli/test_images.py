"""Images on the command line: files and addresses, spans, and two lines for what cannot be read."""

import json
from pathlib import Path

import fsspec
import pytest

from tests.cli.conftest import Run

pytest.importorskip("PIL")
from tests.models.multimodal import PLACES, picture, saved, words


def test_an_image_from_prompt_to_report(run: Run) -> None:
    model, image = saved(Path("model"), "qwen2_5_vl"), picture(Path("cat.png"), 24, 16)
    fsspec.filesystem("memory").pipe("/pictures/cat.png", image.read_bytes())
    Path("p.txt").write_text(words(0, 9))
    options = ["trace", "p.txt", "--model", model, "--chat", "--max-new-tokens", "4", "-q"]
    done = run(*options, "--image", "memory://pictures/cat.png", "--image", image, "-o", "t")
    assert done.status == 0, done.err
    record = json.loads(Path("traces/t/trace.json").read_text())
    images = record["sequences"][0]["images"]
    assert [one["file"] for one in images] == ["memory://pictures/cat.png", "cat.png"]
    assert images[0]["sha256"] == images[1]["sha256"] and [one["tokens"] for one in images] == [6, 6]
    assert "2 in the prompts, 12 tokens" in run("info", "t").out
    assert json.loads(run("info", "t", "--json").out)["images"] == [images]
    assert run("replay", "t", "--policy", "tova", "--budget", "9", "-o", "r", "-q").status == 0
    spans = json.loads(run("spans", "r", "--json").out)
    assert [(one["name"], one["tokens"]) for one in spans["runs"][0]["spans"]] == [("image 1", 6), ("image 2", 6)]
    assert run("report", "r", "-q").status == 0
    what, todo = run("replay", "t", "--policy", "tova", "--budget", "9", "--perplexity", "-o", "c").two_lines()
    assert "memory://pictures/cat.png is an address" in what and "open loop" in todo
    what, _ = run(*options, "--image", "memory://pictures/none.png", "-o", "u").two_lines()
    assert what == "there is no memory://pictures/none.png"
    what, _ = run(*options, "--image", "none.png", "-o", "u").two_lines()
    assert "none.png cannot be read: No such file" in what
    what, todo = run(*[one for one in options if one != "--chat"], "--image", image, "-o", "u").two_lines()
    assert "1 image and no place for images" in what and "--chat" in todo
    what, _ = run("trace", "p.txt", "--model", "demo", "--image", image, "-o", "u").two_lines()
    assert what == "prompt p.txt has images, and demo (llama) reads text alone"
    assert not Path("traces/u").exists()
    Path("more.txt").write_text(" w7 w8 w9")  # it might generate tokens of images, which the closed loop refuses
    done = run(*options, "--image", image, "--continuation", "more.txt", "-o", "v")
    assert done.status == 0, done.err
    assert run("verify", "v", "--policy", "tova", "--budget", "9").status == 0
    assert PLACES["qwen2_5_vl"] in json.loads(Path("traces/v/trace.json").read_text())["prompts"][0]["text"]
