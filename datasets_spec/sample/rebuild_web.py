"""The folder web/: a URL list with captions, the files behind it, and paths that misbehave like the web."""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rebuild_files import by_hash, draw, encode, write_bytes, write_text
from rebuild_sources import ClipArt, clipart_picture, load_clipart

LOG = logging.getLogger("rebuild")
HOST = "http://images.sample.test"
PHOTOS = {  # scikit-image file -> caption; every one CC0 or public domain, see LICENCES.md
    "astronaut.png": "An astronaut in an orange space suit before a flag and a model of the Space Shuttle.",
    "brick.png": "A grey photograph of a wall of rough bricks laid in straight rows.",
    "camera.png": "A black and white photograph of a man in a coat looking through a camera on a tripod.",
    "cell.png": "A single biological cell seen through a microscope in shades of grey.",
    "chelsea.png": "A close-up photograph of the face of a tabby cat with green eyes.",
    "clock_motion.png": "A wall clock photographed while the camera moved, so the dial is blurred.",
    "coffee.png": "A cup of coffee on a saucer with a spoon, standing on a dark wooden table.",
    "grass.png": "A grey photograph of a dense field of grass seen from above.",
    "gravel.png": "A grey photograph of gravel: many small stones lying close together.",
    "hubble_deep_field.jpg": "Hundreds of distant galaxies on black, seen by the Hubble telescope.",
    "retina.jpg": "A photograph of the retina of an eye, orange, with its blood vessels and a bright disc.",
    "rocket.jpg": "A tall white rocket lifts off from its launch pad.",
}
PUBLIC_DOMAIN = ("astronaut.png", "clock_motion.png", "hubble_deep_field.jpg", "rocket.jpg")
TRANSLATED = {  # clip art -> its English caption, translated by hand
    "electronics-satellite-dish-ali-hussn-01": (
        "Antenne parabolique. Antenne parabolique pour recevoir les chaînes de télévision ou de radio. Dessin du "
        "groupe électronique, montrant antenne, dvb, satellite et télécommunication."
    ),
    "electronics-bulb-lightbulb-jon-phillips-02": (
        "Glühbirne. Dies ist ein vektorisiertes Bild einer Glühbirne. Zeichnung der Gruppe Elektronik; sie "
        "zeigt hell, Birne, Edison, Idee, Licht, denken und Gedanke."
    ),
    "buildings-eiffel-tower-michael-ja-r": (
        "埃菲尔铁塔。埃菲尔铁塔的轮廓图。这幅剪贴画属于建筑类,展示建筑物、城市、埃菲尔、欧洲、地标、巴黎和塔。"
    ),
}


@dataclass(slots=True)
class Web:
    """The files of one fictional web server and the URL list that points at them."""

    root: Path
    rows: list[tuple[str, str, str]] = field(default_factory=list)
    routes: dict[str, dict[str, object]] = field(default_factory=dict)

    def add(self, path: str, caption: str, licence: str = "CC-PDDC", **route: object) -> None:
        """List one URL, with the special behaviour of its path if it has one."""
        self.rows.append((path if ":" in path else f"{HOST}/{path}", caption, licence))
        if route:
            self.routes[f"/{path}"] = route

    def save(self, art: ClipArt, form: str | None = None) -> str | None:
        """Write clip art as a file to be served and return its path; None when it cannot be drawn."""
        long_px = 128 + int(256 * (draw(art.name, 1000) / 1000) ** 3.0)
        image = clipart_picture(art, long_px)
        if image is None:
            return None
        form = form or ("jpg", "jpg", "jpg", "png", "webp")[draw(art.name + "form", 5)]
        path = f"art/{art.name}.{form}"
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_bytes(encode(image, "png8" if form == "png" else form, 74))
        return path


def build_web(source: dict[str, Path], out: Path) -> set[str]:
    """URL list with captions, the files behind it and the special paths; returns the clip art it used."""
    web = Web(out / "web/origin")
    arts = load_clipart(source["openclipart"])
    for name, caption in TRANSLATED.items():
        path = web.save(arts[name])
        assert path, f"{name}: cannot be drawn"
        web.add(path, caption)
    order = by_hash(set(arts) - set(TRANSLATED), "web")
    web_arts = iter([arts[name] for name in order])

    def served(n: int, form: str | None = None) -> Iterator[tuple[int, ClipArt, str]]:
        numbers = count(1)
        while (i := next(numbers)) <= n:
            path = None
            while path is None:
                path = web.save(art := next(web_arts), form)
            yield i, art, path

    for i, art, path in served(4):
        web.add(f"moved/{i}.jpg", art.caption, redirect=f"/{path}")
    for i, art, path in served(6):
        web.add(f"noai/{i}.jpg", art.caption, file=path, headers={"X-Robots-Tag": "noai"})
    for i, art, path in served(4, "jpg"):
        web.add(f"cut/{i}.jpg", art.caption, file=path, truncate_bytes=700)
    for _, _, path in served(2):
        web.add(path, "")
    for _, art, path in served(255):
        web.add(path, art.caption)
    pages = {"content_type": "text/html", "body": "<html><body><p>This picture has moved.</p></body></html>"}
    broken = (
        ("gone", 8, {"status": 404}),
        ("slow", 2, {"hang_s": 30}),
        ("page", 4, pages),
        ("error", 3, {"status": 500}),
    )
    for name, n, route in broken:
        for i in range(1, n + 1):
            web.add(f"{name}/{i}.jpg", next(web_arts).caption, **route)
    web.add("private", next(web_arts).caption, redirect="http://127.0.0.1:9/x.jpg")
    web.add("file:///etc/hostname", next(web_arts).caption)
    plain = [row for row in web.rows if f"{HOST}/art/" in row[0] and row[1] and row[1] not in TRANSLATED.values()]
    web.rows += plain[:2]
    for url, caption, licence in plain[2:5]:
        path = url.removeprefix(f"{HOST}/")
        copy = path.replace("art/", "copy/")
        write_bytes(web.root / copy, (web.root / path).read_bytes())
        web.add(copy, caption, licence)
    for name, caption in PHOTOS.items():
        photo = Image.open(source["scikit-image"] / "skimage/data" / name).convert("RGB")
        photo.thumbnail((256, 256) if name in ("grass.png", "gravel.png", "brick.png") else (640, 640))
        path = f"photo/{Path(name).stem}.jpg"
        write_bytes(web.root / path, encode(photo, quality=70))
        web.add(path, caption, "CC0-1.0" if name not in PUBLIC_DOMAIN else "public-domain")
    write_text(web.root / "routes.json", json.dumps(web.routes, indent=1, sort_keys=True) + "\n")
    rows = sorted(web.rows, key=lambda row: draw(row[0], 1 << 40))
    columns = zip(*rows, strict=True)
    table = pa.table(dict(zip(("image_url", "capsfusion", "licence"), map(pa.array, columns), strict=True)))
    pq.write_table(table, out / "web/urls.parquet", compression="zstd")
    LOG.info("web: %d rows, %d special paths", len(rows), len(web.routes))
    return set(arts) - {art.name for art in web_arts}
