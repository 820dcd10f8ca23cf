"""Writing a rejuvenated model holds some rows at a time, whatever its size; the result does not depend on how many."""

import weakref

import pytest
import torch
from lab_models import family_model, moved, save
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mifo.lab import rejuvenate as lab
from mifo.lab import source
from mifo.lab.samples import PairSettings

BLOCK = 128  # elements; the widest row has 48
FP32 = 4


class Held(TorchDispatchMode):
    """The most bytes that tensors made inside it held at once, storages counted once; a view of a mapped file holds none."""

    def __init__(self):
        super().__init__()
        self.storages, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage.data_ptr()
                if key in given and key not in self.storages:
                    continue
                size, count = self.storages.get(key, (storage.nbytes(), 0))
                self.storages[key] = size, count + 1
                weakref.finalize(tensor, self.release, key)
        self.most = max(self.most, sum(size for size, _ in self.storages.values()))
        return result

    def release(self, key):
        size, count = self.storages.pop(key)
        if count > 1:
            self.storages[key] = size, count - 1


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    base = family_model("llama_bias")
    return save(base.bfloat16(), folder / "base"), save(moved(base.float(), 2).bfloat16(), folder / "over")


def made(models, demonstrations, out, watch):
    """The bytes of the model written to `out`, and the most that was held while it was."""
    inner, held = lab._write, Held()

    def write(*arguments):
        with held:
            inner(*arguments)

    watch.setattr(lab, "_write", write)
    settings = lab.RejuvenationSettings(rho=0.05, targets=3, pairs=PairSettings(data=demonstrations, count=6))
    done = lab.rejuvenate(*models, str(out), settings)
    assert done.reset_neurons > 0
    return (out / "model.safetensors").read_bytes(), held.most


def test_what_is_held_is_bounded_and_the_bits_are_the_same(models, demonstrations, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        whole, everything = made(models, demonstrations, tmp_path / "whole", patch)
    with monkeypatch.context() as patch:
        patch.setattr(source, "BLOCK_ELEMENTS", BLOCK)
        streamed, most = made(models, demonstrations, tmp_path / "streamed", patch)
    assert streamed == whole
    masks = 2 * 8 * 1024  # of the neurons to reset: a byte each
    assert (
        most < 8 * BLOCK * FP32 + masks
    )  # both inputs, both in fp32, the fusion, its rounding, and what it is reset to
    assert everything > 2 * most  # the measure sees whole tensors where there are some


def test_a_model_of_more_words_is_written_in_the_same_memory(demonstrations, tmp_path, monkeypatch):
    """Rows of a larger vocabulary come in more runs, not in larger ones."""
    held = []
    for words in (200, 800):
        model = family_model("llama")
        model.resize_token_embeddings(words, mean_resizing=False)
        folders = save(model, tmp_path / f"base{words}"), save(moved(model, 2), tmp_path / f"over{words}")
        with monkeypatch.context() as patch:
            patch.setattr(source, "BLOCK_ELEMENTS", BLOCK)
            held.append(made(folders, demonstrations, tmp_path / f"out{words}", patch)[1])
    assert held[0] == pytest.approx(held[1], rel=0.1)
