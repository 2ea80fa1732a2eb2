import dataclasses
import re

import pytest
import torch
import yaml
from helpers import DENSE
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import commit, export_model, small_flow

from eiwtrain import checkpoints
from eiwtrain.data.manifest import Manifest
from eiwtrain.data.shards import Shard, Split
from eiwtrain.exporting import model_card, models
from eiwtrain.scoring.yardsticks import Yardsticks
from eiwtrain.terminal import markdown

MANIFEST = Manifest(
    name="photos",
    resolution=8,
    channels=3,
    preprocessing={
        "name": "center-crop-resize",
        "version": 2,
        "params": {"resolution": 8, "source": {"name": "folder", "protocol": "patches"}},
    },
    splits={n: Split(n, k, (Shard(n, k, 1, "0"),)) for n, k in (("train", 24), ("test", 8))},
    fingerprint="f" * 64,
    duplicates={"test": 2},
)


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs") / "tiny"
    commit(root, 6, 4.5678)
    return models.metadata_of(checkpoints.newest(str(root)))


def card(metadata, model=None, **given):
    return model_card.render(small_flow(**model or {}).config, 1234, metadata, **given)


def test_the_hub_reads_what_it_is_and_how_good(metadata):
    read = ModelCard(card(metadata, manifest=MANIFEST))
    assert read.data.library_name == "eiwtrain"
    assert read.data.pipeline_tag == "unconditional-image-generation"
    assert read.data.datasets == ["photos"]
    assert read.data.model_name == "tiny"
    assert read.data.license is None  # nobody but the user can say
    (result,) = read.data.eval_results
    assert (result.metric_type, result.metric_value) == ("bits_per_dim", 4.5678)
    assert (result.dataset_name, result.dataset_split) == ("photos (patches)", "test")
    assert result.dataset_revision == "f" * 64


def test_the_card_says_from_what_and_with_what_effort(metadata):
    text = card(metadata, manifest=MANIFEST, yardsticks=Yardsticks(8, {"png": 5.25, "webp": 5.125}))
    for fact in (
        "For the same images lossless coders need",
        "# tiny\n",
        "**4.5678 ± 0.0100** bits/dim on 8 images of split `test`",
        "PNG 5.2500, WebP lossless 5.1250",
        "photos (patches)",
        "preprocessing: center-crop-resize, version 2 (resolution 8)",
        "source: name folder, protocol patches",
        "images: train 24, test 8",
        "of test, 2 have the pixels of another image",
        f"fingerprint: `{'f' * 64}`",
        "6 optimizer steps",
        "48 images seen, 2 epochs",
        "2 hours of wall time over all attempts; 2 workers at the end",
        "global_batch 8",
        "`step-00000006-00000006`",
        "1,234 parameters",
        "2 levels of 2 steps",
        "(shuffle `soft`), in blocks of 4",
        "ELBO, one draw of uniform dequantization noise",
        "The shuffle is eiwtrain's own",
        "arXiv 1810.09136",
        "No figure of the paper is",
    ):
        assert fact in text


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_what_is_not_known_has_no_line(data, metadata):
    known = data.draw(st.sets(st.sampled_from(sorted(metadata))))
    some = {key: value if key in known else None for key, value in metadata.items()}
    text = card(some)
    assert "None" not in text
    assert ("±" in text) == ({"eval_bits_per_dim", "eval_standard_error"} <= known)
    assert ("optimizer steps" in text) == ("step" in known)
    assert text == card({key: metadata[key] for key in metadata if key in known})
    front = yaml.safe_load(text.split("---\n")[1])
    assert ("model-index" in front) == ({"data", "eval_bits_per_dim"} <= known)
    assert "license" not in front


@pytest.mark.parametrize(
    ("model", "facts"),
    [
        (
            DENSE | {"units": [3, 1], "steps": [1, 4]},
            (
                "DenseFlow's backbone: 2 levels of 3 and 1 units, a unit of 1 and 4 steps; 2 channels of noise join",
                "learned order of the channels before each split",
                "ELBO, one draw of variational dequantization noise and noise that joins",
                "github.com/studying910/EIW-Flow",
                "commit 0c4ddeb, which has no licence",
            ),
        ),
        (DENSE | {"shuffle": "none"}, ("2 levels of 2 and 1 units, a unit of 1 step;", "no shuffle", "not part of")),
        ({"shuffle": "order", "steps": [2, 3]}, ("Glow's backbone: 2 levels of 2 and 3 steps", "0c4ddeb")),
        ({"levels": 1, "shuffle": "order"}, ("1 level of 2 steps", "no split", "is not part of this model")),
    ],
)
def test_the_card_says_how_the_model_is_built_and_whose_that_is(metadata, model, facts):
    text = card(metadata, model).replace("\n", " ")
    for fact in (*facts, "No figure of the paper is claimed"):
        assert fact in text


@pytest.mark.parametrize("model", [{}, {"classes": 2}, DENSE])
def test_the_code_in_the_card_runs_as_it_stands(tmp_path, model):
    model = small_flow(**model)
    export_model(model, tmp_path / "m", step=1)
    blocks = re.findall(r"```python\n(.*?)```", (tmp_path / "m" / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    labels = torch.tensor([0, 1])
    names = {"pixels": pixels, "labels": labels}
    exec(blocks[0].replace("path/to/this/folder", str(tmp_path / "m")), names)
    assert names["images"].shape == (16, 3, 8, 8)
    assert names["bits"].shape == (2,)
    images = pixels.permute(0, 2, 3, 1).contiguous().numpy()
    names = {"images": images, "labels": [0, 1]}
    exec(blocks[1].replace("path/to/this/folder", str(tmp_path / "m")), names)
    assert names["bits"].shape == (2,)


def test_the_metadata_name_the_estimator_of_the_score(metadata, tmp_path):
    assert (metadata["eval_estimator"], metadata["eval_draws"]) == ("ELBO", 1)
    assert metadata["eval_noise"] == "uniform dequantization noise"
    commit(tmp_path / "unscored", 6, None)
    unscored = models.metadata_of(checkpoints.newest(str(tmp_path / "unscored")))
    assert unscored["eval_estimator"] is None


def test_a_published_model_tells_no_path_and_no_address(metadata):
    assert not re.search(r"/nowhere|/x\b|://", str(metadata))


def test_yardsticks_of_fewer_images_than_the_score_say_so(metadata):
    assert "For the first 3 of these images lossless" in card(metadata, yardsticks=Yardsticks(3, {"png": 5.25}))


def test_skipped_steps_are_told(metadata):
    assert "6 optimizer steps, 2 of them skipped" in card(metadata | {"updates": 4})


HOSTILE = (
    "x\n---\nlicense: mit\n---\n# Owned\n<script>alert(1)</script>"
    "<img src=x onerror=alert(1)> [click](http://evil) ![i](http://evil/i.png) `code` | a | \x1b[2J "
    "\u202e http://evil www.evil.com"
)


def test_facts_that_others_wrote_are_text_in_the_card_and_nothing_else(metadata):
    keys = ("run", "data", "eval_split", "train_split", "data_fingerprint", "checkpoint", "eiwtrain")
    params = {HOSTILE: HOSTILE, "source": {HOSTILE: HOSTILE}}
    made = {"name": HOSTILE, "version": HOSTILE, "params": params}
    splits = {HOSTILE: Split(HOSTILE, 8, (Shard("a", 8, 1, "0"),))}
    manifest = dataclasses.replace(MANIFEST, name=HOSTILE, preprocessing=made, splits=splits, duplicates={HOSTILE: 1})
    hostile = metadata | dict.fromkeys(keys, HOSTILE) | {"training": {HOSTILE: HOSTILE}}
    page = card(hostile, manifest=manifest)
    plain = card(metadata | {"training": {}}, manifest=MANIFEST)
    read = ModelCard(page)
    assert read.data.license is None
    heads = [line for line in page.splitlines() if line.startswith("#")]
    assert len(heads) == len([line for line in plain.splitlines() if line.startswith("#")])
    body = re.sub(r"`[^`\n]*`", "", page.partition("\n---\n")[2].partition("## How to use it")[0])
    for mark in ("<script", "<img", "](http://evil", "![i]", "http://evil", "www.evil", "\x1b", "\u202e"):
        assert mark not in body.replace("\\<", "").replace("\\]", "")
    assert "\x1b" not in page
    assert "\n" not in manifest.title
    assert "<" not in re.sub(r"\\.", "", model_card.summary(small_flow().config, 1, hostile))


@given(st.text(max_size=60))
def test_any_text_is_one_line_of_markdown(value):
    for line in (markdown.text(value), markdown.code(value)):
        assert len(f"a{line}b".splitlines()) == 1
    assert not re.match(r"[#>+-]", markdown.text(value))
    assert "<" not in re.sub(r"\\.", "", markdown.text(value))
    assert markdown.code(value).count("`") == 2
