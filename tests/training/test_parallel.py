"""Micro-batches and multiple processes give the same training as whole batches."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_pairs import MODEL, TRAIN, toy_batches, toy_pairs
from transformers import AutoBackbone, BertConfig, BertModel, BertTokenizerFast, SwinConfig
from transformers.models.swin.modeling_swin import SwinLayer

from l2l_core.config import ModelParams
from l2l_core.core.files import scratch_folder
from l2l_core.core.masks import encode_rle
from l2l_core.data.pairs import Targets
from l2l_core.errors import ConfigError
from l2l_core.model.segmenter import Segmenter
from l2l_core.training.checkpoint import save_checkpoint
from l2l_core.training.loop import batch_parts, train
from l2l_core.training.streams import Stream

STEPS = 4
ROOT = Path(__file__).parents[2]


@given(share=st.integers(1, 20), processes=st.integers(1, 5), micro=st.none() | st.integers(1, 30))
def test_micro_batches_split_a_batch_evenly(share, processes, micro):
    """Every sample occurs once. Each process gets equally many parts. No part is empty or above the limit, and sizes
    differ by at most one."""
    parts = batch_parts(share * processes, micro, processes)
    assert sorted(np.concatenate(parts).tolist()) == list(range(share * processes))
    assert len(parts) % processes == 0
    sizes = [len(part) for part in parts]
    assert min(sizes) >= 1
    assert max(sizes) <= min(sizes) + 1
    assert max(sizes) <= (micro or share)


def test_refuses_a_batch_not_divisible_by_the_processes():
    with pytest.raises(ConfigError, match=r"train\.batch_size: got 6, expected a multiple of the 4 processes"):
        batch_parts(6, None, 4)


def encoders(folder: Path) -> ModelParams:
    """Save a small Swin and a small BERT to disk; neither draws random numbers nor mixes samples."""
    if not folder.exists():
        torch.manual_seed(0)
        swin = SwinConfig(
            image_size=32,
            patch_size=2,
            embed_dim=8,
            depths=[1, 1, 1],
            num_heads=[1, 2, 2],
            window_size=4,
            drop_path_rate=0.0,
            out_features=["stage1", "stage2", "stage3"],
        )
        AutoBackbone.from_config(swin).save_pretrained(folder / "swin")
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "square", "on", "left", "right"]
        (folder / "vocab.txt").write_text("\n".join(words))
        BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder / "bert")
        bert = BertConfig(
            vocab_size=len(words),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        BertModel(bert).save_pretrained(folder / "bert")
    paths = {"image_encoder": str(folder / "swin"), "text_encoder": str(folder / "bert")}
    return MODEL.model_copy(update=paths)


def trained(folder: Path, **changes: object) -> tuple[list[dict[str, float]], dict[str, torch.Tensor], bool]:
    """Train on a labeled and a pseudo-labeled stream in which two samples keep no pixels. Return the curve, the
    weights, and whether a checkpoint was written."""
    pairs, targets = toy_pairs(folder / "images", 6)
    nothing = [encode_rle(np.zeros((height, width), bool)) for height, width in pairs.hw.tolist()]
    everything = [encode_rle(np.ones((height, width), bool)) for height, width in pairs.hw.tolist()]
    kept = Targets(targets.label, [nothing[0], *everything[1:5], nothing[5]])
    network = Segmenter.create(encoders(folder / "encoders"), pairs.sentence, 0)
    engine = TRAIN.engine.model_copy(update=changes)
    params = TRAIN.model_copy(update={"batch_size": 8, "lr": 1e-3, "encoder_lr_scale": 1.0, "engine": engine})
    streams = [Stream(toy_batches(pairs), targets, 0.25), Stream(toy_batches(pairs), kept, 0.75)]
    checkpoint = folder / f"checkpoint-{os.environ.get('RANK', 'alone')}.pt"
    checkpoint.unlink(missing_ok=True)
    result = train(network, streams, STEPS, params, seed=3, run_name="test", checkpoint=checkpoint)
    return result.curve, result.teacher.state_dict(), checkpoint.exists()


def assert_alike(found, expected):
    """Compare within the tolerance of reordered float sums; Adam divides by small gradients, so weights differ more."""
    (curve, weights), (other_curve, other_weights) = found[:2], expected[:2]
    assert len(curve) == STEPS
    for row, other in zip(curve, other_curve, strict=True):
        assert row == pytest.approx(other, rel=2e-4)
    for name, value in weights.items():
        torch.testing.assert_close(value, other_weights[name], rtol=1e-3, atol=2e-4, msg=name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    return folder, trained(folder)


@pytest.mark.parametrize("micro", [1, 3])
def test_micro_batches_add_up_to_the_whole_batch(whole, micro):
    folder, expected = whole
    assert expected[0][0]["loss"] != expected[0][1]["loss"]
    assert_alike(trained(folder, micro_batch_size=micro), expected)


def test_gradient_checkpointing_does_not_change_the_result(whole, monkeypatch):
    folder, expected = whole
    passes, forward = [], SwinLayer.forward
    monkeypatch.setattr(SwinLayer, "forward", lambda *given, **named: passes.append(1) or forward(*given, **named))
    assert_alike(trained(folder), expected)
    once = len(passes)
    assert_alike(trained(folder, gradient_checkpointing=True), expected)
    assert len(passes) >= 3 * once  # those of the first training, and at least twice as many


def test_names_encoders_without_gradient_checkpointing(tmp_path):
    pairs, _ = toy_pairs(tmp_path, 2)
    with pytest.raises(ConfigError, match=r"gradient_checkpointing: got true, but model\.image_encoder \(ResNetBack"):
        Segmenter.create(MODEL, pairs.sentence, 0).enable_gradient_checkpointing()


def launches(nodes: int) -> list[list[str]]:
    """Commands that start two processes: by torchrun of one machine, or by one torchrun for each of two machines."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", f"--nnodes={nodes}"]
    options = ["--standalone"] if nodes == 1 else meeting
    torchrun = [sys.executable, "-m", "torch.distributed.run", *options, f"--nproc-per-node={2 // nodes}", __file__]
    return nodes * [torchrun]


@pytest.mark.parametrize("nodes", [1, 2])
def test_two_processes_train_like_one(whole, nodes):
    """Uses torchrun, as on two GPUs of one machine or of two machines, with two micro-batches and a data worker per
    process; gloo replaces NCCL."""
    folder, expected = whole
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    started = [
        subprocess.Popen([*launch, folder], env=environment, stderr=subprocess.PIPE, text=True)
        for launch in launches(nodes)
    ]
    try:
        for process in started:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in started:
            process.kill()
    first, second = (torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert_alike(first, expected)
    assert second[0] == first[0]
    for name, value in first[1].items():
        torch.testing.assert_close(value, second[1][name], rtol=0, atol=0)  # the processes do not drift apart
    assert first[2]
    assert not second[2]  # only one process writes checkpoints
    for rank in (0, 1):
        (folder / f"rank-{rank}.pt").unlink()


def test_only_the_first_process_owns_the_scratch_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    with scratch_folder("warmup", "key") as first:
        save_checkpoint(first / "checkpoint.pt", {"step": 3})
        monkeypatch.setenv("RANK", "1")
        with scratch_folder("warmup", "key") as second:
            assert (second / "checkpoint.pt").exists()  # reads the files of the first process
        assert (first / "checkpoint.pt").exists()
        monkeypatch.delenv("RANK")
    assert not first.exists()


if __name__ == "__main__":  # one of the processes of test_two_processes_train_like_one
    out = Path(sys.argv[1])
    result = trained(out, micro_batch_size=2, workers=1)
    torch.save(result, out / f"rank-{os.environ['RANK']}.pt")
