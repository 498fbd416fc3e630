import logging
import math
from pathlib import Path

import pytest
import torch

from megalite.metrics.accumulator import LossMeter
from megalite.metrics.base import GuardedSink, panels
from megalite.metrics.hardware import memory_bytes, mfu, peak_flops
from megalite.redaction import redact, redact_text


def test_the_mean_of_one_loss_is_that_loss():
    meter = LossMeter(torch.device("cpu"))
    loss = torch.tensor(1 / 3, requires_grad=True)
    meter.add(loss)
    assert meter.take() == loss.item()


def test_the_meter_starts_over_after_each_reading():
    meter = LossMeter(torch.device("cpu"))
    for value in (1.0, 2.0, 6.0):
        meter.add(torch.tensor(value))
    assert meter.take() == 3.0
    meter.add(torch.tensor(7.0))
    assert meter.take() == 7.0
    assert math.isnan(meter.take())


def test_adding_a_loss_does_not_wait_for_the_device():
    # On the meta device nothing can be read: any host synchronisation would raise.
    meter = LossMeter(torch.device("meta"))
    meter.add(torch.zeros((), device="meta"))
    with pytest.raises(RuntimeError):
        meter.take()


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("Tesla V100-SXM2-32GB", 125e12),
        ("Tesla V100-PCIE-16GB", 112e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA RTX A4000", None),
    ],
)
def test_peak_flops_by_device_name(name, peak):
    assert peak_flops(name) == peak


def test_mfu_of_a_known_device(monkeypatch):
    # Megatron-LM's published 7.1B row: 465.9 TFLOP/s a GPU on 96 H100 is 47 %.
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    flops_per_token = 6 * 7.1e9
    tokens_per_second = 96 * 465.9e12 / flops_per_token
    assert mfu(tokens_per_second, flops_per_token, torch.device("cuda", 0), 96) == pytest.approx(0.471, abs=1e-3)


def test_mfu_is_unknown_on_a_cpu():
    assert mfu(1e3, 1e9, torch.device("cpu"), 1) is None


def test_memory_on_a_cpu_is_the_resident_set():
    assert 50 * 2**20 < memory_bytes(torch.device("cpu")) < 2**40


def test_panels_carry_the_names_that_users_look_for():
    row = {"loss": 2.0, "learning_rate": 1e-3, "mfu": None, "memory_bytes": 3 * 2**30, "eval/tang/perplexity": 9.0}
    assert panels(row) == {"train/loss": 2.0, "optim/lr": 1e-3, "mem/max_gib": 3.0, "eval/tang/perplexity": 9.0}
    assert panels({"tokens_per_second": 5.0, "loss_scale": 8}) == {"perf/tokens_per_s": 5.0, "train/loss_scale": 8}


class BrokenSink:
    def log(self, step, row):
        raise OSError("https://user:canary@host is full")

    def close(self):
        raise RuntimeError("closed twice")


def test_a_broken_sink_is_one_warning(caplog):
    sink = GuardedSink(BrokenSink())
    with caplog.at_level(logging.WARNING):
        for step in range(5):
            sink.log(step, {})
        sink.close()
    (record,) = caplog.records
    assert "BrokenSink could not record step 0" in record.getMessage()
    assert "canary" not in record.getMessage()


def test_redaction_takes_secrets_and_leaves_the_rest():
    values = {
        "hf_token": "canary",
        "api_key": "canary",
        "aws": {"secret_access_key": "canary", "region": "eu"},
        "password": "canary",
        "paths": ["s3://key:canary@bucket/x", "plain@example.org", "https://host/path@2"],
        "num_tokens": 5,
        "tokenizer": {"path": "a"},
        "token": None,
    }
    clean = redact(values)
    assert "canary" not in str(clean)
    assert clean["paths"] == ["s3://***@bucket/x", "plain@example.org", "https://host/path@2"]
    assert clean["aws"] == {"secret_access_key": "***", "region": "eu"}
    assert (clean["num_tokens"], clean["tokenizer"], clean["token"]) == (5, {"path": "a"}, None)
    assert values["hf_token"] == "canary"


def test_user_info_of_urls():
    assert redact_text("at https://u:p@h/x and ftp://q@h") == "at https://***@h/x and ftp://***@h"
    assert redact_text(str(Path("https://u:p@h/x"))) == "https:/***@h/x"
    assert redact_text("me@host, a:b@c, /home/me@work") == "me@host, a:b@c, /home/me@work"
