"""A small set of labelled pictures as it is published: on the web, in a repository of the hub, and in a folder."""

from __future__ import annotations

from contextlib import contextmanager

from archive_server import Hub, Site, serving
from test_acquire import build

from solo.acquire import location
from solo.acquire import part as acquire
from solo.artifact import Job, make
from solo.spec import SourceSpec

COMMIT = "0123456789" * 4
TOKEN = "hf_secretsecretsecret"
FILES = ("mapping.txt", "train-0.tar", "train-1.tar")
LOCAL = {"location": "pics", "adapter": "webdataset_labels.read", "args": {"mapping": "mapping.txt"}}


def made_locally(specs):
    """The folder that is published everywhere, its pin, and the artifact that a local copy of it becomes."""
    build(specs / "pics")
    pin = f"sha256:{acquire.content_sha256(specs / 'pics')}"
    made, _ = make(job(source(pin, LOCAL), specs.parent / "root", specs), acquire.run)
    return specs / "pics", pin, made


@contextmanager
def served(folder):
    """The same as a web site and as a repository of the hub, in a folder of it beside another file."""
    with serving(Site()) as made:
        for path in folder.iterdir():
            made.files[f"/archive/pics/{path.name}"] = path.read_bytes()
        tree = {f"data/pics/{p.name}": p.read_bytes() for p in folder.iterdir()} | {"data/other.tar": b"no"}
        made.hub = Hub({"owner/set": {COMMIT: tree}}, store=f"http://127.0.0.1:{made.port}")
        yield made


def source(revision, fields, name="pics"):
    return SourceSpec.model_validate(
        {
            "name": name,
            "title": "Pictures",
            "licence": {"id": "CC0-1.0", "url": "https://example.org"},
            "revision": revision,
            "modality": "image-text",
            "acquire": LOCAL | {"samples_per_shard": 4} | fields,
            "filter": {"signals": [], "keep": {}},
            "shard": {"samples_per_shard": 4, "template": "plain"},
        }
    )


def job(spec, root, specs, progress=lambda _: None):
    asked = location.identity(spec)
    return Job("acquire", spec.name, acquire.VERSION, asked, {}, root, specs, 1, progress, location.where(spec))


def web(site, **fields):
    ports = {"loopback_ports": {"archive.test": site.port}}
    return {"location": "http://archive.test/archive/pics", "files": FILES} | ports | fields


HUB = {"location": "huggingface:owner/set/data/pics", "files": ["*.tar", "mapping.txt"]}
