"""The README.md of an exported model: what it is, what it was trained on, how good it is, and how to use it.

It is Markdown under a front matter that Hugging Face's hub reads (https://huggingface.co/docs/hub/model-cards). A fact
that the metadata lacks has no line. Not for measuring anything.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from eiwtrain.config.construction import construction
from eiwtrain.data.manifest import Manifest
from eiwtrain.flow import FlowConfig
from eiwtrain.scoring.estimator import estimator_of
from eiwtrain.scoring.yardsticks import Yardsticks
from eiwtrain.terminal.lines import one_line
from eiwtrain.terminal.markdown import code, text

CARD_FILE = "README.md"
SAMPLES_FILE = "samples.png"
_TASK = "unconditional-image-generation"

_USE = """\
## How to use it

With eiwtrain installed, of which `eiwtrain.flow` imports torch and safetensors alone:

```python
import torch
from eiwtrain import flow

model = flow.load("path/to/this/folder")
{sample}
```

Through MLflow, beside eiwtrain. Images are uint8 of shape (n, {height}, {width}, {channels}):

```python
import mlflow

bits = mlflow.pyfunc.load_model("path/to/this/folder").predict(images{labels})  # bits/dim of each image
```

From the command line: `python -m eiwtrain.evaluate FOLDER --data DATA`, `python -m eiwtrain.sample FOLDER`.

Weights are in `model.safetensors`, with the architecture in its header and, to be read, in `config.json`. Nothing in
this folder is pickled, and none of it is code.
"""

_LIMITS = """\
## Intended use and limits

- For research on likelihood-based models: density estimation, sampling, lossless-compression bounds, scores of images
  like those of its data. It is not for identifying or judging people, nor for decisions about them, and its samples
  are no evidence of anything.
- Bits/dim is what the model needs to code an image, per pixel and channel; figures compare only on the same data set,
  resolution, preprocessing and bits per channel. Lower bits/dim does not mean better-looking samples.
- A low score does not mean that an image is like the training data: flows give simple images of other data sets higher
  likelihood than their own (Nalisnick et al., [arXiv 1810.09136](https://arxiv.org/abs/1810.09136)). Do not use it as a
  detector of foreign images without measuring that on yours.
- It has the biases of its data, and its samples may resemble images of its data.
"""

_AUTHORS = """\
of the public program of EIW-Flow's authors ([github.com/studying910/EIW-Flow](https://github.com/studying910/EIW-Flow)
at commit 0c4ddeb, which has no licence), re-expressed: none of its code is here, and eiwtrain's `docs/flow.md` says
what differs."""
_PAPER = "of EIW-Flow ([arXiv 2407.04958](https://arxiv.org/abs/2407.04958))"
_NO_FIGURE = "No figure of the paper is claimed or reproduced here."


def render(
    config: FlowConfig,
    parameters: int,
    metadata: Mapping[str, Any],
    manifest: Manifest | None = None,
    yardsticks: Yardsticks | None = None,
) -> str:
    """Return the text of the card.

    Args:
        parameters: numbers in the weights.
        metadata: as `eiwtrain.exporting.models.metadata_of` returns it; any of it may be missing.
        manifest: of the data set, if it can be read.
        yardsticks: of the first images of the score.
    """
    known = {key: value for key, value in metadata.items() if value is not None}
    sections = [
        f"# {text(known.get('run', 'An image flow'))}\n\n{summary(config, parameters, known)}\n",
        f"![Samples of this model]({SAMPLES_FILE})\n",
        _score(config, known, yardsticks),
        _bullets("Data", _data(known, manifest)),
        _bullets("Training", _training(known, manifest)),
        _bullets("Architecture", _architecture(config, parameters)),
        _use(config),
        _LIMITS,
        f"## The paper\n\n{origin(config)}\n",
    ]
    front = yaml.safe_dump(front_matter(config, known), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n" + "\n".join(section for section in sections if section)


def summary(config: FlowConfig, parameters: int, metadata: Mapping[str, Any]) -> str:
    """Describe the model in a sentence or two of Markdown."""
    channels, height, width = config.image_shape
    kind = "class-conditional normalizing flow" if config.classes else "normalizing flow"
    data = f", trained on {text(metadata['data'])}" if metadata.get("data") else ""
    said = f"A model of {height}x{width} images of {channels} channels: a {kind} of "
    said += f"{parameters:,} parameters{data}"
    return said + f" with eiwtrain {text(metadata['eiwtrain'])}." if metadata.get("eiwtrain") else said + "."


def origin(config: FlowConfig) -> str:
    """Say whose construction the model is, in Markdown."""
    if config.shuffle == "order" and config.levels > 1:
        what = "The construction" if config.backbone == "dense" else "The order of channels before each split"
        return f"{what} is that {_AUTHORS} {_NO_FIGURE}"
    said = "The backbone is DenseFlow's ([arXiv 2106.04627](https://arxiv.org/abs/2106.04627)), re-expressed. "
    said = said if config.backbone == "dense" else ""
    if config.shuffle in ("soft", "hard") and config.levels > 1:
        said += f"The shuffle is eiwtrain's own, in the spirit of the abstract {_PAPER}, not the authors'. "
    else:
        said += f"The learned order {_PAPER} is not part of this model. "
    return said + _NO_FIGURE


def front_matter(config: FlowConfig, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the card's YAML. It has no license: the owner of the weights chooses one."""
    front: dict[str, Any] = {
        "library_name": "eiwtrain",
        "tags": ["normalizing-flow", "density-estimation", "safetensors", "eiwtrain"],
    }
    if not config.classes:
        front["pipeline_tag"] = _TASK
    title, bits = one_line(metadata.get("data") or ""), metadata.get("eval_bits_per_dim")
    if title:
        # on the hub a data set's id has no spaces; the protocol, after the name, is in the model index
        data_id = re.sub(r"[^\w.-]+", "-", title.partition(" (")[0]).strip("-.") or "unnamed"
        front["datasets"] = [data_id]
    if title and bits is not None:
        front["metrics"] = ["bits_per_dim"]
        of = {"name": title, "type": data_id}
        if metadata.get("eval_split"):
            of["split"] = one_line(metadata["eval_split"])
        if metadata.get("data_fingerprint"):
            of["revision"] = one_line(metadata["data_fingerprint"])
        measured = {
            "type": "bits_per_dim",
            "name": f"bits/dim, {estimator_of(config).name} (lower is better)",
            "value": round(bits, 6),
        }
        result = {"task": {"type": _TASK, "name": "density estimation"}, "dataset": of, "metrics": [measured]}
        front["model-index"] = [{"name": one_line(metadata.get("run", "flow")), "results": [result]}]
    return front


def _score(config: FlowConfig, known: Mapping[str, Any], yardsticks: Yardsticks | None) -> str:
    if "eval_bits_per_dim" not in known:
        return ""
    bits = f"**{known['eval_bits_per_dim']:.4f}"
    if "eval_standard_error" in known:
        bits += f" ± {known['eval_standard_error']:.4f}"
    where = f" on {known['eval_images']:,} images" if "eval_images" in known else ""
    where += f" of split {code(known['eval_split'])}" if "eval_split" in known else ""
    lines = [
        f"## Bits per dimension\n\n{bits}** bits/dim{where}: the mean and its standard error over images; "
        f"{config.n_bits} bits per channel.\n",
        f"The estimator is {estimator_of(config)} for each image, so the figure is an upper bound. "
        "`python -m eiwtrain.evaluate --iwbo K` computes a tighter one, IWBO(K).\n",
    ]
    if yardsticks is not None:
        names = {"png": "PNG", "webp": "WebP lossless"}
        coders = ", ".join(f"{names.get(k, k)} {v:.4f}" for k, v in yardsticks.bits_per_dim.items())
        of_all = yardsticks.images == known.get("eval_images")
        which = "the same images" if of_all else f"the first {yardsticks.images:,} of these images"
        lines.append(f"For {which} lossless coders need, one file an image: {coders} bits/dim.\n")
    return "\n".join(lines)


def _data(known: Mapping[str, Any], manifest: Manifest | None) -> list[str]:
    facts = []
    if "data" in known:
        facts.append(text(known["data"]))
    if manifest is not None:
        params = dict(manifest.preprocessing["params"])
        source = params.pop("source", None)
        made = manifest.preprocessing
        facts.append(
            f"preprocessing: {text(made['name'])}, version {text(made['version'])}"
            + (f" ({_pairs(params)})" if params else "")
        )
        if isinstance(source, dict):
            facts.append("source: " + _pairs(source))
        facts.append("images: " + ", ".join(f"{text(name)} {s.samples:,}" for name, s in manifest.splits.items()))
        if (split := known.get("eval_split")) and manifest.duplicates.get(split):
            facts.append(
                f"of {text(split)}, {manifest.duplicates[split]:,} have the pixels of another image of the data set"
            )
    if "data_fingerprint" in known:
        facts.append(f"fingerprint: {code(known['data_fingerprint'])}")
    return facts


def _training(known: Mapping[str, Any], manifest: Manifest | None) -> list[str]:
    facts = []
    if "step" in known:
        skipped = known["step"] - known.get("updates", known["step"])
        facts.append(f"{known['step']:,} optimizer steps" + (f", {skipped:,} of them skipped" if skipped else ""))
    if "samples_seen" in known:
        images = f"{known['samples_seen']:,} images seen"
        train = manifest.splits.get(known.get("train_split", "")) if manifest is not None else None
        facts.append(images + (f", {known['samples_seen'] / train.samples:.3g} epochs" if train else ""))
    if "wall_seconds" in known:
        hours = f"{known['wall_seconds'] / 3600:.3g} hours of wall time over all attempts"
        facts.append(hours + (f"; {known['workers']} workers at the end" if "workers" in known else ""))
    if "training" in known:
        facts.append(_pairs(known["training"]))
    if "checkpoint" in known:
        facts.append(f"averaged weights of checkpoint {code(known['checkpoint'])}")
    return facts


def _architecture(config: FlowConfig, parameters: int) -> list[str]:
    facts = [
        f"{parameters:,} parameters",
        *construction(config),
        f"{config.dequantization} dequantization, {config.n_bits} bits per channel",
        f"conditioners in {config.conditioner_dtype}, trunk in {config.trunk_dtype}",
    ]
    return facts + ([f"{config.classes} classes"] if config.classes else [])


def _use(config: FlowConfig) -> str:
    channels, height, width = config.image_shape
    labels = ", labels" if config.classes else ""
    noise = "noise = torch.rand(len(pixels), *model.config.noise_shape)"
    sample = [
        f"images = model.to_images(model.sample(16, temperature=0.8))  # uint8 (16, {channels}, {height}, {width})",
        f"{noise}  # pixels: uint8 of that shape" + (", labels: int64 (n,)" if config.classes else ""),
        f"bits = model.bits_per_dim(pixels, noise{labels})  # of each image: ELBO",
    ]
    params = ', params={"labels": labels}' if config.classes else ""
    return _USE.format(sample="\n".join(sample), height=height, width=width, channels=channels, labels=params)


def _pairs(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{text(key)} {text(value)}" for key, value in facts.items())


def _bullets(title: str, facts: list[str]) -> str:
    return f"## {title}\n\n" + "".join(f"- {fact}\n" for fact in facts) if facts else ""
