import math
from types import SimpleNamespace

import pytest
import torch
from nmoe.train.health import health_tags, layer_label, router_figures


def model(*loads, bias=(0.0, 0.0, 0.0, 0.0)):
    routers = [
        (f"layers.{i}", SimpleNamespace(load=torch.tensor(load), bias=torch.tensor(bias)))
        for i, load in enumerate(loads)
    ]
    return SimpleNamespace(routers=lambda: iter(routers))


def router_health(model):
    return health_tags(model, router_figures(model).flatten().tolist())


def test_an_even_load_is_perfect():
    assert router_health(model([5.0, 5.0, 5.0, 5.0])) == pytest.approx(
        {
            "router/0/load_entropy": 1.0,
            "router/0/max_over_mean": 1.0,
            "router/0/dead_experts": 0.0,
            "router/0/bias_range": 0.0,
        }
    )


def test_a_collapsed_load_shows():
    health = router_health(model([8.0, 8.0, 0.0, 0.0], bias=(0.1, -0.3, 0.0, 0.0)))
    assert health["router/0/load_entropy"] == pytest.approx(math.log(2) / math.log(4))
    assert health["router/0/max_over_mean"] == pytest.approx(2.0)
    assert health["router/0/dead_experts"] == 2
    assert health["router/0/bias_range"] == pytest.approx(0.4)


def test_layers_are_told_apart_and_a_dense_model_has_none():
    assert {tag.split("/")[1] for tag in router_health(model([1.0] * 4, [2.0] * 4))} == {"0", "1"}
    assert router_health(model()) == {}
    assert layer_label("mtp.1.block") == "mtp1"
