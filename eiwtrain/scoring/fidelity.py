"""FID and KID: how far the features of samples are from those of real images.

The features come from torch-fidelity's port of the Inception network that published figures use; the user gives its
weights as a file, and nothing is fetched. Not for sampling, nor for bits/dim.
"""

from __future__ import annotations

import importlib.util
import io
import re
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.torch
import scipy.linalg
import torch
from sklearn.metrics.pairwise import polynomial_kernel
from torch import Tensor, nn

from eiwtrain import storage
from eiwtrain.terminal.lines import one_line

Features = npt.NDArray[np.float64]

PUBLISHED = "weights-inception-2015-12-05-6726825d.pth"
"""The file of the weights that published FIDs use, from torch-fidelity's release v0.2.0 on GitHub."""

_LAYER = "2048"
_DIGEST = re.compile(r"-([0-9a-f]{8,64})\.")  # as torch.hub names files
_SUBSETS, _SUBSET = 100, 1000


@dataclass(frozen=True)
class Network:
    """The network that computes features of images.

    Attributes:
        module: maps uint8 (n, 3, H, W) to a tuple of one tensor, (n, 2048).
        sha256: of the file of its weights, hex.
    """

    module: nn.Module
    sha256: str

    @property
    def is_published(self) -> bool:
        """Whether figures can be compared with published ones."""
        return self.sha256.startswith("6726825d")


@dataclass(frozen=True)
class Kid:
    """Kernel Inception Distance: mean and standard deviation over random subsets of `size` images of either set.

    If both sets have the size of a subset, or are equally large and smaller, there is one subset and no deviation.
    """

    mean: float
    deviation: float
    subsets: int
    size: int


def load_network(url: str, device: torch.device) -> Network:
    """Load the feature network with the weights in a file: .safetensors, or .pth, read by PyTorch's restricted loader,
    which runs no code. Digits of SHA-256 in the file's name, as in `PUBLISHED`, must match its bytes.

    Raises:
        ValueError: torch-fidelity is not installed, or the file does not hold these weights; one line.
        FileNotFoundError: there is no such file.
        StorageError: it cannot be read.
    """
    inception = _inception()
    if not url.endswith((".pth", ".safetensors")):
        raise ValueError(f"--fid-weights: {url} is neither .pth nor .safetensors; give {PUBLISHED} of torch-fidelity")
    try:
        content = storage.read_bytes(url)
    except FileNotFoundError:
        raise ValueError(f"--fid-weights: {url} is not there; give {PUBLISHED} of torch-fidelity") from None
    sha256 = storage.sha256_bytes(content)
    named = _DIGEST.search(url.rpartition("/")[2])
    if named and not sha256.startswith(named[1]):
        raise ValueError(f"--fid-weights: the SHA-256 of {url} begins with {sha256[:8]}, its name says {named[1]}")
    try:
        safe = _tensors(content, url)
        # The network unpickles its file without PyTorch's restrictions: so it gets bytes that were written here.
        file = io.BytesIO()
        torch.save(safe, file)
        file.seek(0)
        module = inception("inception-v3-compat", [_LAYER], feature_extractor_weights_path=file)
    except (RuntimeError, ValueError, safetensors.SafetensorError) as e:
        why = one_line(e, 120)
        raise ValueError(f"--fid-weights: {url} does not hold the weights of FID's Inception ({why})") from None
    return Network(module.to(device), sha256)


def features(network: Network, batches: Iterable[Tensor]) -> Features:
    """Return the features of uint8 images (n, 3, H, W), batch by batch: (N, 2048)."""
    device = next(network.module.parameters()).device
    # TensorFloat-32 would move FID in its second decimal.
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        parts = [network.module(images.to(device).contiguous())[0].double().cpu().numpy() for images in batches]
    return np.concatenate(parts)


def frechet_distance(a: Features, b: Features) -> float:
    """Return the FID of features (m, d) and (n, d): |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)), of their means and
    covariances (Heusel et al. 2017, arXiv 1706.08500, equation 6).

    It depends on the number of images of each set: with fewer images it is larger.
    """
    roots = [_root_of_covariance(x) for x in (a, b)]
    # A = R'R and B = S'S, so A B has the eigenvalues of (R S')(R S')': the squares of the singular values of R S'.
    cross = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    gap = a.mean(0) - b.mean(0)
    return float(gap @ gap + sum(np.square(r).sum() for r in roots) - 2 * cross)


def kernel_distance(a: Features, b: Features, seed: int = 0) -> Kid:
    """Return the KID of features (m, d) and (n, d): the unbiased squared MMD with the kernel (x.y / d + 1)^3 (Bińkowski
    et al. 2018, arXiv 1801.01401, section 4). It may be slightly below zero."""
    size = min(_SUBSET, len(a), len(b))
    subsets = 1 if size == len(a) == len(b) else _SUBSETS
    generator = np.random.default_rng(seed)
    values = [_mmd2(*(x[generator.permutation(len(x))[:size]] for x in (a, b))) for _ in range(subsets)]
    return Kid(float(np.mean(values)), float(np.std(values)), subsets, size)


def _mmd2(a: Features, b: Features) -> float:
    aa, bb, ab = polynomial_kernel(a), polynomial_kernel(b), polynomial_kernel(a, b)  # whose defaults are KID's
    within = sum((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (aa, bb))
    return float(within - 2 * ab.mean())


def _root_of_covariance(x: Features) -> Features:
    """Return R with R'R the covariance of the rows; R has at most as many rows as x."""
    (root,) = scipy.linalg.qr((x - x.mean(0)) / np.sqrt(len(x) - 1), mode="r")
    return root[: x.shape[1]]


def _tensors(content: bytes, url: str) -> dict[str, Tensor]:
    if url.endswith(".safetensors"):
        return safetensors.torch.load(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as e:  # for bytes of another kind it may raise anything
        raise ValueError(f"PyTorch's restricted loader refuses it: {type(e).__name__}") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"it holds a {type(loaded).__name__}")
    return loaded


def _inception() -> Any:
    """Return the class of torch-fidelity's network.

    The package imports torchvision, which the network does not need, and whose usual build cannot be imported beside a
    CPU build of torch: so only the network's module is run, not the package.
    """
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None:
        raise ValueError("--fid-weights: FID needs torch-fidelity: pip install -e '.[fid]'")
    whole = sys.modules.get("torch_fidelity")
    sys.modules["torch_fidelity"] = whole or importlib.util.module_from_spec(spec)
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    finally:
        if whole is None:
            del sys.modules["torch_fidelity"]
    return FeatureExtractorInceptionV3
