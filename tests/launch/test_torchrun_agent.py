"""torchrun as we run it: who failed is told at once, and ranks that are asked to stop have time to save."""

import signal
from types import SimpleNamespace

import pytest
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from megalite.launch import torchrun_agent


@pytest.mark.parametrize(
    ("code", "seconds", "told"),
    [
        (None, torchrun_agent._SAVE_SECONDS, ""),  # torchrun itself has got a signal
        (75, torchrun_agent._SAVE_SECONDS, ""),
        (-9, torchrun_agent._OTHERS_SECONDS, "rank 3 (pid 7) was ended by SIGKILL at "),
        (2, torchrun_agent._OTHERS_SECONDS, "rank 3 (pid 7) ended with exit code 2 at "),
    ],
)
def test_who_failed_is_told_before_the_others_are_ended(code, seconds, told, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(SubprocessContext, "close", lambda self, death_sig, timeout: asked.append(timeout))
    pids, ends = torchrun_agent._tell_failures_at_once()
    failures = {} if code is None else {1: ProcessFailure(local_rank=1, pid=7, exitcode=code, error_file="none")}
    handlers = {number: SimpleNamespace(proc=SimpleNamespace(returncode=number)) for number in (0, 75)}
    ranks = SimpleNamespace(_failures=failures, envs={1: {"RANK": "3"}}, subprocess_handlers=handlers)
    for _ in range(2):
        SubprocessContext.close(ranks, signal.SIGTERM)
    assert asked == [seconds] * 2
    assert capsys.readouterr().err.count("rank 3") == bool(told), "once"
    assert ends == {0, 75}
    assert pids == ({7} if told else set())
