"""Pictures as decoded give the patches that a cut on the host gives, and a pack's memory is nobody else's."""

import gc
import threading

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decode import encode, smooth

from solo.sequence.patches import patchify
from solo.sequence.raster import AT_ONCE, BYTES, Recycled, Room

sides = st.integers(1, 6)


@settings(max_examples=60)
@given(st.lists(st.tuples(sides, sides), min_size=1, max_size=5), st.sampled_from([4, 14, 32]), st.randoms())
def test_any_patches_of_any_pictures(grids, px, random):
    n = sum(rows * cols for rows, cols in grids)
    room, at, expected = Room.of(np.full((n * px, BYTES * px), 7, np.uint8), px), 0, []
    for i, (rows, cols) in enumerate(grids):
        pixels = np.random.default_rng(i).integers(0, 256, (rows * px, cols * px, BYTES), np.uint8)
        room[at : at + rows * cols].picture(rows, cols)[...] = pixels.view("<u4")[..., 0]
        cut = pixels[..., :3].reshape(rows, px, cols, px, 3).transpose(0, 2, 4, 1, 3)
        expected.append(cut.reshape(rows * cols, -1))
        assert np.array_equal(np.asarray(room[at : at + rows * cols]), expected[-1])
        at += rows * cols
    raster, whole = room.raster(), torch.from_numpy(np.concatenate(expected))
    assert raster.shape == whole.shape and len(raster) == n
    assert torch.equal(raster.clone(), whole)
    which = torch.tensor([random.randrange(n) for _ in range(n + 2)])
    assert torch.equal(raster.to("cpu")[which], whole[which])
    assert torch.equal(raster._gathered(raster.first[which], raster.step[which]), whole[which])  # as on a GPU
    assert torch.equal(raster[whole[:, 0] > 99], whole[whole[:, 0] > 99])


def test_more_patches_than_are_cut_at_once():
    rows, cols, px = 40, AT_ONCE // 16, 4
    words = np.random.default_rng(1).integers(0, 1 << 32, (rows * px, cols * px), np.uint32)
    room = Room.of(np.zeros((rows * cols * px, BYTES * px), np.uint8), px)
    room.picture(rows, cols)[...] = words
    red = words.astype(np.uint8).reshape(rows, px, cols, px).transpose(0, 2, 1, 3).reshape(rows * cols, -1)
    assert np.array_equal(np.asarray(room)[:, : px * px], red)


def test_nothing_is_a_pack_too():
    raster = Room.of(Recycled(64).take((0, 128)), 32).raster()
    assert raster.shape == (0, 3072) and raster.clone().shape == (0, 3072)


def test_a_picture_on_its_grid_is_decoded_in_place(monkeypatch):
    data = encode(smooth(96, 64), "JPEG")
    room = Room.of(np.zeros((6 * 32, BYTES * 32), np.uint8), 32)
    monkeypatch.delattr("solo.sequence.decode.Scratch.take")  # an intermediate would need it
    assert patchify(data, patch_px=32, max_side_px=256, path="fast", out=room) is room
    assert np.array_equal(np.asarray(room), patchify(data, patch_px=32, max_side_px=256))


def test_memory_serves_again_only_when_nothing_refers_to_it():
    memory = Recycled(1 << 16)
    first = memory.take((16, 16))
    where = first.ctypes.data
    part = torch.from_numpy(first)[2:4].view(-1)
    del first
    gc.collect()
    assert memory.take((4, 4)).ctypes.data != where  # a view of a view of it lives
    del part
    gc.collect()
    assert where in (memory.take((4, 4)).ctypes.data for _ in [0])


def test_threads_never_share_memory():
    memory, wrong = Recycled(4096), []
    start = threading.Barrier(6)

    def work(mark):
        start.wait()
        for _ in range(300):
            mine = memory.take((64, 64))
            mine[...] = mark
            if (mine != mark).any():
                wrong.append(mark)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(memory._free) <= 12  # each holds its last array while it asks for the next
