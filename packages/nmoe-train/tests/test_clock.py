"""Moments: what is looked at while one has not come."""

import pytest
import torch
from nmoe.train.clock import Moment


class Event:
    """Comes at the third asking."""

    def __init__(self):
        self.asked = 0

    def query(self):
        self.asked += 1
        return self.asked > 2

    def synchronize(self):
        raise AssertionError("nobody could be told of a fault here")


def test_a_fault_is_told_while_the_device_has_not_come_to_an_end():
    moment = Moment(torch.device("cpu"))
    moment._event = Event()
    checks = []
    moment.wait(lambda: checks.append(1))
    assert len(checks) == 2

    def fault():
        raise RuntimeError("a rank is missing")

    moment._event = Event()
    with pytest.raises(RuntimeError, match="a rank is missing"):
        moment.wait(fault)


def test_on_a_cpu_a_moment_has_come():
    Moment(torch.device("cpu")).wait(lambda: pytest.fail("there is nothing to wait for"))
