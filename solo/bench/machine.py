"""Bench of training, the machine: what it has, and what is missing with the remedy, before minutes of it are spent.

In: whether a GPU is needed. Out: facts for people and for the result; an error that names every missing package at
once. Invariant: nothing is imported here that a bare machine with torch lacks. Cost: milliseconds; `facts` loads torch.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

# Module -> wheel, of what the bench imports and a machine with torch, transformers and pyarrow may lack.
WHEELS = {
    "deepspeed": "deepspeed",
    "hjson": "hjson",
    "duckdb": "duckdb",
    "pydantic": "pydantic",
    "pydantic_core": "pydantic-core",
    "typing_inspection": "typing-inspection",
    "annotated_types": "annotated-types",
    "simplejpeg": "simplejpeg",
    "imagehash": "imagehash",
    "mistral_common": "mistral-common",
}
THERE = {
    "torch": "torch",
    "transformers": "transformers",
    "pyarrow": "pyarrow",
    "numpy": "numpy",
    "scipy": "scipy",
    "PIL": "pillow",
    "psutil": "psutil",
    "yaml": "pyyaml",
    "sentencepiece": "sentencepiece",
    "safetensors": "safetensors",
    "accelerate": "accelerate",
    "einops": "einops",
    "msgpack": "msgpack",
    "cpuinfo": "py-cpuinfo",
    "tqdm": "tqdm",
}
FACTS = ("torch", "triton", "transformers", "deepspeed")
MATMUL = 8192  # on a side, of the product that shows what the GPU gives: 776 TFLOP/s where the goals were measured
AT_LEAST_BYTES = 2**36  # of free disk, for a checkpoint of the slice and the compiler's caches


def check_packages() -> None:
    """Raise one error that names all missing packages."""
    missing = [wheel for module, wheel in (WHEELS | THERE).items() if importlib.util.find_spec(module) is None]
    if missing:
        python, there = "{}.{}".format(*sys.version_info), [name for name in missing if name != "deepspeed"]
        remedies = [f"pip download --no-deps --only-binary=:all: --python-version {python} -d wheels {' '.join(there)}"]
        remedies = remedies if there else []
        if "deepspeed" in missing:  # published as source alone; its wheel is for every Python
            remedies.append("pip wheel --no-deps -w wheels deepspeed")
        raise ValueError(
            f"bench train: python {python} lacks {', '.join(missing)}; at the versions of infra/constraints.txt, where "
            f"there is a network: {'; '.join(remedies)}; then here: pip install --no-index --no-deps wheels/*.whl"
        )


def facts() -> dict[str, Any]:
    """What there is, as found; a GPU that torch cannot use is None."""
    import torch

    cuda = torch.cuda.is_available()
    gpu = torch.cuda.get_device_properties(0) if cuda else None
    compiler = next((path for name in (os.environ.get("CC") or "gcc", "clang") if (path := shutil.which(name))), None)
    return {
        "device": gpu.name if gpu else "cpu",
        "gpu_gib": round(gpu.total_memory / 2**30, 1) if gpu else None,
        "cuda": torch.version.cuda,
        "n_cores": os.cpu_count(),
        "host_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load": round(os.getloadavg()[0], 2),
        "compiler": compiler,
        "packages": {name: _version(name) for name in FACTS} | {"python": sys.version.split()[0]},
    }


def matmul_tflops() -> float | None:
    """What the GPU gives in a plain bf16 product; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    a, b = (torch.randn(MATMUL, MATMUL, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    repeats = 20
    for i in range(2 * repeats):
        if i == repeats:
            torch.cuda.synchronize()
            began = time.perf_counter()
        a @ b
    torch.cuda.synchronize()
    return round(repeats * 2 * MATMUL**3 / (time.perf_counter() - began) / 1e12, 1)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
