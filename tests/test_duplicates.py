"""Duplicates: every near pair is found, clusters have one winner, and threads change nothing."""

from itertools import combinations

import duckdb
import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw import acquired, filtered, picture, rows, same_files, sample

from solo.filter import duplicates
from solo.spec import SpecError

WORDS = [f"w{i}" for i in range(3_000)]


def verdicts(artifact):
    return {
        int(row["key"].split("-")[1], 16): (row["reason"], row["winner"] and int(row["winner"].split("-")[1], 16))
        for row in rows(artifact.path / "verdicts.parquet")
    }


def pairs(hashes, most, threads=2):
    with duckdb.connect(config={"threads": threads}) as con:
        table = {"node": np.arange(len(hashes)), "bits": np.array(hashes, np.uint64)}
        import pyarrow as pa

        con.register("nodes", pa.table(table))
        return {tuple(p) for batch in duplicates.close(con, "nodes", "nodes", most) for p in batch.tolist()}


@settings(max_examples=25)
@given(st.integers(0, 3), st.integers(0, 2**32))
def test_every_pair_within_three_bits_is_found_and_no_other(most, seed):
    rng = np.random.default_rng(seed)
    hashes = [int(h) for h in rng.integers(0, 2**64, 40, np.uint64)]
    for near in range(0, 40, 2):  # neighbours at 0 to 5 bits, wherever they fall
        flips = rng.choice(64, rng.integers(0, 6), replace=False)
        hashes.append(hashes[near] ^ sum(1 << int(b) for b in flips))
    want = {(a, b) for a, b in combinations(range(60), 2) if (hashes[a] ^ hashes[b]).bit_count() <= most}
    assert pairs(hashes, most) == want


def test_three_bits_anywhere_leave_two_of_five_blocks_alone():
    for flips in combinations(range(64), 3):
        word = sum(1 << b for b in flips)
        assert any(word & mask == 0 for mask in duplicates.masks())


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=60), st.integers(1, 7))
def test_clusters_are_the_connected_components(edges, batch):
    graph = networkx.Graph()
    graph.add_nodes_from(range(31))
    graph.add_edges_from(edges)
    want = {n: min(c) for c in networkx.connected_components(graph) for n in c}
    batches = (np.array(edges[i : i + batch], np.int64) for i in range(0, len(edges), batch))
    assert dict(enumerate(duplicates.connected(batches, 31).tolist())) == want


def test_few_pairs_are_held_at_a_time(monkeypatch):
    monkeypatch.setattr(duplicates, "MAX_EDGES", 3)
    chain = (np.array([[i, i + 1]]) for i in reversed(range(50)))
    assert set(duplicates.connected(chain, 51).tolist()) == {0}


def shifted(seed, **how):
    """One picture, once as it is and once saved again, smaller and with loss."""
    return picture(128, 96, seed=seed), picture(96, 72, seed=seed, kind="JPEG", quality=70)


def test_near_images_leave_the_smallest_key_and_name_it(root):
    (a, small_a), (b, small_b), (c, _) = (shifted(i) for i in range(3))
    samples = [
        sample(5, images=[a]),
        sample(3, images=[small_a]),
        sample(4, images=[b]),
        sample(1, images=[b], caption="x"),  # fails a predicate, so it is nobody's winner
        sample(6, images=[small_b]),
        sample(7, images=[c]),
        sample(8),
        sample(9),
    ]
    signals = ["image.size", "image.hashes", "image.colours", "text.size"]
    source = acquired(root, samples)
    made = filtered(root, source, signals=signals, keep={"long": "n_chars > 5"}, near={"image": 3, "colour": 16})
    want = dict.fromkeys((3, 4, 7, 8, 9), (None, None)) | {1: ("long", None)}
    assert verdicts(made) == want | {5: ("near_image", 3), 6: ("near_image", 4)}
    assert made.manifest.counts == {"in": 8, "kept": 5, "dropped": {"long": 1, "near_image": 2}}


def test_other_colours_are_another_picture(root):
    from PIL import Image

    def tinted(band):
        import io

        grey = Image.open(io.BytesIO(picture(64, 64, seed=5))).convert("L")
        black = Image.new("L", grey.size)
        out = io.BytesIO()
        Image.merge("RGB", [grey if i == band else black for i in range(3)]).save(out, "PNG")
        return out.getvalue()

    source = acquired(root, [sample(i, images=[tinted(i)]) for i in (0, 2)])
    how = {"signals": ["image.hashes", "image.colours"]}
    assert verdicts(filtered(root, source, near={"image": 3}, **how))[2] == ("near_image", 0)
    assert verdicts(filtered(root, source, near={"image": 3, "colour": 16}, **how))[2] == (None, None)


def test_near_texts(root):
    rng = np.random.default_rng(1)
    long = [WORDS[i] for i in rng.integers(0, len(WORDS), 200)]
    other = [WORDS[i] for i in rng.integers(0, len(WORDS), 200)]
    texts = {
        1: " ".join(long),
        2: " ".join([*long[:190], "one", "end"]).upper(),  # 186 runs of 5 words in common, of 204
        3: " ".join([*long[:100], *other[:100]]),
        4: " ".join(other),
        5: None,
        6: "short",
        7: "Short!",
    }
    source = acquired(root, [sample(i, caption=t) for i, t in texts.items()])
    made = filtered(root, source, signals=["text.size", "text.minhash"], near={"text": 0.8})
    assert {i: w for i, (r, w) in verdicts(made).items() if r == "near_text"} == {2: 1, 7: 6}


def test_a_winner_that_goes_hands_on_what_it_won(root):
    """3 repeats 2's bytes, then 2 is near 1: what is kept in the end is 1, for both."""
    a, small = shifted(1)
    source = acquired(root, [sample(1, images=[a]), sample(2, images=[small]), sample(3, images=[small])])
    made = filtered(root, source, signals=["image.hashes"], unique=["image_sha256"], near={"image": 3})
    assert verdicts(made) == {1: (None, None), 2: ("near_image", 1), 3: ("duplicate_image_sha256", 1)}


def test_equal_in_two_columns(root):
    a, b = picture(64, 48, seed=1), picture(64, 48, seed=2)
    cases = [(a, "x"), (a, "y"), (b, "x"), (a, "x"), (None, "x"), (None, "x")]
    source = acquired(root, [sample(i, images=[p] if p else [], caption=t) for i, (p, t) in enumerate(cases)])
    made = filtered(root, source, unique=["phash + text_sha256"])
    assert verdicts(made) == dict.fromkeys((0, 1, 2, 4, 5), (None, None)) | {3: ("duplicate_phash_text_sha256", 0)}


def many():
    made = []
    for i in range(40):
        big, small = shifted(i % 13)
        words = [WORDS[(i % 7) * 100 + j] for j in range(60)] + [WORDS[i]]
        made.append(sample(i, images=[big if i % 2 else small], caption=" ".join(words)))
    return made


def test_bytes_do_not_depend_on_threads_and_every_winner_is_kept(root, tmp_path):
    how = {"signals": ["image.hashes", "image.colours", "text.size", "text.minhash"], "unique": ["image_sha256"]}
    how |= {"near": {"image": 3, "colour": 16, "text": 0.8}}
    made = [filtered(r, acquired(r, many()), workers=n, **how) for r, n in ((root, 1), (tmp_path / "four", 4))]
    assert same_files(*made)
    found = verdicts(made[0])
    kept = {key for key, (reason, _) in found.items() if reason is None}
    assert {reason for reason, _ in found.values()} == {None, "duplicate_image_sha256", "near_image", "near_text"}
    assert all((winner in kept) == (reason is not None) for reason, winner in found.values())
    assert all(winner < key for key, (_, winner) in found.items() if winner is not None)


def test_a_threshold_that_moves_reads_no_pixel(root):
    source = acquired(root, many())
    signals = ["image.hashes", "image.colours", "text.minhash"]
    first = filtered(root, source, signals=signals, near={"image": 3, "colour": 16})
    assert first.manifest.stats["n_decodes"] == 40
    for near in ({}, {"image": 0}, {"image": 3, "colour": 0, "text": 0.9}):
        assert filtered(root, source, signals=signals, near=near).manifest.stats["n_decodes"] == 0
    more = filtered(root, source, signals=[*signals, "image.texture"])
    assert more.manifest.stats["n_decodes"] == 40
    assert (
        filtered(root, source, signals=[*signals, "image.texture", "image.exif", "text.size"]).manifest.stats[
            "n_decodes"
        ]
        == 0
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"near": {"image": 3}}, r"near\.image needs column 'phash'; add image\.hashes"),
        ({"near": {"text": 0.8}}, r"near\.text needs column 'minhash'; add text\.minhash"),
        ({"near": {"image": 4}}, r"filter\.near\.image: .*less than or equal to 3"),
        ({"near": {"colour": 4}}, r"colour narrows what image finds"),
        ({"near": {"text": 0.2}}, r"filter\.near\.text: .*greater than or equal to 0\.7"),
        ({"unique": ["n_chars + n_wrods"]}, r"filter\.unique: no column 'n_wrods'"),
        (
            {"near": {"text": 0.8}, "keep": {"near_text": "true"}, "signals": ["text.minhash"]},
            r"near_text: that is the reason given by filter\.near",
        ),
    ],
)
def test_mistakes_in_a_spec(root, spec, message):
    with pytest.raises(SpecError, match=message):
        filtered(root, acquired(root, [sample(1)]), **({"signals": ["text.size"]} | spec))
