"""The benchmark runs on a tiny problem, and its programs agree."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from benchmarks import hessian


def run(path, **settings):
    config = hessian.Config(repeats=1, problems="mlp-tiny", out=str(path), **settings)
    return hessian.run(config)


def test_ncjax_and_arpack_agree(tmp_path, capsys):
    summary = run(tmp_path / "hessian.json", torch=False)
    assert "PyHessian skipped" in capsys.readouterr().out
    assert json.loads((tmp_path / "hessian.json").read_text()) == summary
    for result in summary["results"]:
        assert result["dim"] == 1584
        assert len(result["rows"]) == 4
        for row in result["rows"]:
            assert row["worst_relative_residual"] < result["tol"]
            assert row["worst_relative_error"] < result["tol"]
            assert row["num_hvps"] > 0


def test_pyhessian_is_given_the_same_loss(tmp_path):
    reason = "PyHessian and torch are not installed: pip install torch pyhessian"
    torch = pytest.importorskip("torch", reason=reason)
    pytest.importorskip("pyhessian", reason=reason)
    for problem in (hessian.mlp((16, 12, 4), 32, 5), hessian.layer_peeled(3, 4, 5, 3.0)):
        model, criterion, (x, labels) = problem.torch_parts(problem.params, problem.batch)
        loss = criterion(model(x), labels)
        data = () if problem.batch is None else (problem.batch,)
        expected = float(problem.fn(problem.params, *data))
        np.testing.assert_allclose(float(loss.detach()), expected, rtol=1e-12)
        # Same order of parameters, so that its vectors can be measured.
        flat = torch.cat([p.ravel() for p in model.parameters()]).detach().numpy()
        np.testing.assert_array_equal(flat, ravel_pytree(problem.params)[0])
        found = hessian.pyhessian_call(problem)(0)
        product = hessian.hessian_product(problem.fn, problem.params, problem.batch)
        top = np.linalg.norm(product(jnp.asarray(found.vectors[0], float)))
        np.testing.assert_allclose(abs(found.values[0]), top, rtol=0.05)


def test_bad_settings_are_named(tmp_path):
    with pytest.raises(ValueError, match="--problems must be among"):
        hessian.run(hessian.Config(problems="mlp-1k"))
    with pytest.raises(ValueError, match="--repeats must be at least 1"):
        hessian.run(hessian.Config(repeats=0))
