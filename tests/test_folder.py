"""The files of a checkpoint folder: what is missing is named, with what the folder seems to be."""

import shutil

import pytest
from runs import refused

from funcprobe.training.checkpoint import load_checkpoint


def test_a_missing_folder_is_refused(tmp_path):
    refused(tmp_path / "nowhere", "no such folder", "hub id", error=FileNotFoundError)


def test_a_runs_folder_lists_its_checkpoints(run):
    shutil.copytree(run.path, run.path.parent / "checkpoint-4")
    refused(
        run.path.parent, "checkpoint-3, checkpoint-4", "Pass one of these", error=FileNotFoundError
    )


@pytest.mark.parametrize(
    "shards, words",
    [
        ([], "save_only_model"),
        (["global_step3", "zero_to_fp32.py"], "found global_step3"),
        (["optimizer_0", "pytorch_model_fsdp_0"], "optimizer_0, pytorch_model_fsdp_0"),
        (["rank0-of-8-optimizer.pt"], "rank0-of-8-optimizer.pt"),
    ],
)
def test_a_missing_optimizer_is_refused(run, shards, words):
    (run.path / "optimizer.pt").unlink()
    for name in shards:
        (run.path / name).mkdir()
    if shards:
        words = (words, "DeepSpeed or FSDP")
    else:
        words = (words, "optimizer.pt or optimizer.bin was expected")
    refused(run.path, *words, "optimizer='fresh', lr=", error=FileNotFoundError)
    assert load_checkpoint(run.path, optimizer="fresh", lr=1e-3).step == 3


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_weights_are_refused_without_asking_the_hub(run, file):
    (run.path / file).unlink()
    refused(run.path, file, "found none", error=FileNotFoundError)
