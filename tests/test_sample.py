"""The form of a sample in a tar, and what is refused in its place."""

import ast
import io
import json
import pickle
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from solo.sample import IMAGE, Sample, end_tar, make_key, parse_sample, parse_samples, read_sample, text, write_sample

ROOT = Path(__file__).parents[1]
KEY = make_key("web", "a")
WHO = ({"role": "user", "content": [IMAGE, text("hi")]},)


def tar_of(members):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data, *kind in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in (kind[0] if kind else {}).items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def record(key=KEY):
    return json.dumps({"key": key, "source": "web", "messages": WHO, "meta": {}}).encode()


images = st.lists(st.binary(max_size=1500), max_size=4).map(tuple)
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@given(st.lists(st.tuples(images, words), max_size=5))
def test_what_was_written_is_read_by_us_and_by_tarfile(contents):
    samples = [
        Sample(make_key("web", str(i)), "web", data, ({"role": "user", "content": [text(said)]},), {"said": said})
        for i, (data, said) in enumerate(contents)
    ]
    tar, places = io.BytesIO(), []
    for sample in samples:
        places.append((tar.tell(), write_sample(tar, sample)))
    end_tar(tar)
    assert list(parse_samples(io.BytesIO(tar.getvalue()))) == samples
    for sample, (offset, length) in zip(samples, places, strict=True):
        assert parse_sample(tar.getvalue()[offset : offset + length]) == sample
    with tarfile.open(fileobj=io.BytesIO(tar.getvalue())) as plain:
        assert len(plain.getnames()) == sum(1 + len(s.images) for s in samples)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a member was unpickled",))


@pytest.mark.parametrize(
    "suffix", ["pyd", "pkl", "pickle", "pth", "pt", "npy", "py", "so", "0.pyd", "0.jpg.pkl", "cls"]
)
def test_a_member_that_could_be_unpickled_is_refused_by_name(suffix):
    hostile = tar_of([(f"{KEY}.json", record()), (f"{KEY}.{suffix}", pickle.dumps(Bomb()))])
    with pytest.raises(ValueError, match=rf"'{KEY}\.{suffix}' is neither"):
        list(parse_samples(io.BytesIO(hostile)))


@pytest.mark.parametrize(
    ("member", "why"),
    [
        ((f"../{KEY}.0.jpg", b""), "neither"),
        ((f"/etc/{KEY}.json", b"{}"), "neither"),
        ((f"{KEY}.1.jpg", b""), "not the next image"),  # 0 comes first
        (("web-0000000000000000.0.jpg", b""), "not the next image"),
        ((f"{KEY}.0.jpg", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}), "no regular file"),
        ((f"{KEY}.0.jpg", b"", {"type": tarfile.LNKTYPE, "linkname": f"{KEY}.json"}), "no regular file"),
        ((f"{KEY}.0.jpg", b"", {"type": tarfile.CHRTYPE}), "no regular file"),
        ((f"{KEY}.0.jpg", b"", {"type": tarfile.DIRTYPE}), "no regular file"),
        (("web-0000000000000000.json", record()), "holds the key"),
    ],
)
def test_a_member_that_is_no_part_of_the_sample_is_refused(member, why):
    with pytest.raises(ValueError, match=why):
        list(parse_samples(io.BytesIO(tar_of([(f"{KEY}.json", record()), member]))))


def test_an_image_without_a_sample_is_refused():
    with pytest.raises(ValueError, match="not the next image"):
        list(parse_samples(io.BytesIO(tar_of([(f"{KEY}.0.jpg", b"")]))))


def test_any_damaged_header_and_any_missing_end_is_an_error_not_another_sample(tmp_path):
    sample = Sample(KEY, "web", (b"\xff\xd8\xff" + bytes(700),), WHO, {})
    tar = io.BytesIO()
    length = write_sample(tar, sample)
    data = tar.getvalue()
    for at in [*range(512), 1024]:  # 1024: the second header; its checksum covers every byte
        bad = bytearray(data)
        bad[at] ^= 0x15
        with pytest.raises(ValueError, match=r"tar (header|member)"):
            parse_sample(bytes(bad))
    for kept in (0, 511, 512, 700, length - 512, length - 1):
        with pytest.raises(ValueError, match=r"tar (header|member)|0 samples"):
            parse_sample(data[:kept])
    (tmp_path / "00000.tar").write_bytes(data)
    assert read_sample(tmp_path / "00000.tar", 0, length) == sample
    with pytest.raises(ValueError, match=r"00000\.tar ends 512 bytes before"):
        read_sample(tmp_path / "00000.tar", 512, length)


def test_nothing_that_reads_data_can_unpickle():
    """No module loads pickles; one that would import webdataset, whose decoder can, must assert WDS_SECURE first."""
    forbidden = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle"}
    seen = 0
    for path in [*ROOT.glob("solo/**/*.py"), *ROOT.glob("flows/*.py")]:
        source = path.read_text(encoding="utf-8")
        names = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.split(".")[0])
        assert not names & forbidden, path
        assert "webdataset" not in names or 'assert os.environ["WDS_SECURE"] == "1"' in source, path
        assert "allow_pickle=True" not in source and "weights_only=False" not in source, path
        seen += 1
    assert seen > 40
