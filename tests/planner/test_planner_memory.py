"""The meter of tensor bytes: a blind one would pass every test of memory."""

import torch
from tensor_peak import TensorPeak


def test_the_meter_counts():
    with TensorPeak() as meter:
        a = torch.zeros(1000)  # 4,000 bytes
        b = a[1:].view(-1) + 1  # views add nothing; 3,996
        del a
        c = torch.cat([b, b])  # 7,992 after 4,000 were freed
        c.mul_(2)
    assert meter.bytes == 3996 + 7992


def test_what_existed_before_is_not_counted():
    """A view of a weight is a new tensor on an old storage."""
    weight = torch.zeros(10, 100)
    with TensorPeak() as meter:
        weight.t().unsqueeze(0).add_(1)
    assert meter.bytes == 0


def test_the_meter_sees_the_backward_pass():
    x = torch.zeros(500, requires_grad=True)  # made before: not counted
    with TensorPeak() as meter:
        (x.exp() * 2).sum().backward()
    assert 3 * 2000 <= meter.bytes <= 4.1 * 2000  # exp's output, its product or gradients of both
