"""Names, and the way back from them."""

from __future__ import annotations

import pytest

from posttrain.plan.names import parse_resource_path, resource_path


def test_the_path_of_a_run_names_it() -> None:
    assert parse_resource_path(resource_path(namespace="team-a", run="demo")) == ("team-a", "demo")


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/" + resource_path(namespace="team", run="demo"),
        resource_path(namespace="team", run="demo") + "/",
        resource_path(namespace="team", run="demo/../other"),
        resource_path(namespace="team", run="demo\n"),
        resource_path(namespace="", run="demo"),
        resource_path(namespace="team", run="x" * 64),
        resource_path(namespace="team", run="demo").replace("posttrain.dev", "posttrainxdev"),
    ],
)
def test_no_other_path_names_a_run(path: str) -> None:
    assert parse_resource_path(path) is None
