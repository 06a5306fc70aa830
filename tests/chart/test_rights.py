"""The operator may do what its code asks the API server for, and nothing else.

The code's requests are found in its source: a call on a cluster that `CALLS` does not list fails, and so does a row
without a call. What a plan makes and deletes is read from the golden plans.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from posttrain.control.kinds import (
    CHILDREN,
    CONFIG_MAP,
    EVENT,
    JOB,
    LEASE,
    PLURALS,
    POD,
    PYTORCHJOB,
    RESOURCE_FLAVOR,
    SECRET,
    TOKEN_REVIEW,
    TRAINING_RUN,
    WORKLOAD_PRIORITY_CLASS,
    Kind,
)
from tests.support.chart_rights import read_rights

ROOT = Path(__file__).parents[2]
CONTROL = ROOT / "operator" / "posttrain" / "control"
PLANS = [
    list(yaml.load_all(file.read_text(), Loader=yaml.CSafeLoader))
    for file in (ROOT / "tests/golden/training_run").glob("*/expected.yaml")
]
PLANNED: set[Kind] = {(made["apiVersion"], made["kind"]) for _, *objects in PLANS for made in objects}
DELETED: set[Kind] = {
    kind for verdict, *_ in PLANS for ref in verdict["deletes"] for kind in CHILDREN if kind[1] == ref.split()[0]
}
SEEN = PLANNED - {SECRET}
"""What is read and repaired: a Secret is created, and never looked at."""
PATCHED: set[tuple[Kind, str]] = {
    (kind, patch["subresource"])
    for verdict, *_ in PLANS
    for patch in verdict["patches"]
    for kind in CHILDREN
    if kind[1] == patch["object"].split()[0]
}

VERBS = {
    "create": "create",
    "apply": "patch",
    "apply_status": "patch",
    "patch": "patch",
    "delete": "delete",
    "get": "get",
    "list": "list",
    "pages": "list",
    "watch": "watch",
}
"""The port's methods and what the API server calls them. An apply names a uid, so it never creates."""
NOT_ASKING = {"port", "cluster", "fence"}
"""Modules that are the port, or hand its calls on."""

CALLS: dict[tuple[str, str, str], Iterable[Kind]] = {
    ("authentication", "_find", "get"): (POD, JOB, PYTORCHJOB),
    ("authentication", "_read_run", "get"): (TRAINING_RUN,),
    ("authentication", "_review_token", "create"): (TOKEN_REVIEW,),
    ("authority", "_bring", "apply"): (CONFIG_MAP,),
    ("authority", "_bring", "create"): (CONFIG_MAP,),
    ("authority", "_bring", "get"): (CONFIG_MAP,),
    ("lease", "_make", "create"): (LEASE,),
    ("lease", "_try", "get"): (LEASE,),
    ("lease", "_write", "patch"): (LEASE,),
    ("lease", "release", "get"): (LEASE,),
    ("progress", "_fold_into_status", "apply_status"): (TRAINING_RUN,),
    ("progress", "_read", "get"): (TRAINING_RUN,),
    ("queues", "_ask", "list"): (RESOURCE_FLAVOR, WORKLOAD_PRIORITY_CLASS),
    ("reconciler", "_create", "create"): PLANNED,
    ("reconciler", "_delete", "delete"): DELETED,
    ("reconciler", "_find", "get"): SEEN,
    ("reconciler", "_look", "delete"): (TRAINING_RUN,),
    ("reconciler", "_own_code", "get"): (CONFIG_MAP,),
    ("reconciler", "_patch", "patch"): (),  # PATCHED, each with its subresource
    ("reconciler", "_refresh", "get"): (TRAINING_RUN, *(kind for kind, _ in PATCHED)),
    ("reconciler", "_repair", "apply"): SEEN,
    ("reconciler", "_require_no_gang", "list"): (POD,),
    ("reconciler", "_tell", "create"): (EVENT,),
    ("reconciler", "_write_status", "apply_status"): (TRAINING_RUN,),
    ("reflector", "_watch", "watch"): CHILDREN,
    ("reflector", "list_into", "pages"): (TRAINING_RUN, *CHILDREN),
    ("waiting", "_read_events", "list"): (EVENT,),
}


def find_calls() -> set[tuple[str, str, str]]:
    """Return module, function and method of every call on a cluster."""
    found = set()
    for file in CONTROL.glob("*.py"):
        if file.stem in NOT_ASKING:
            continue
        for function in ast.walk(ast.parse(file.read_text())):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for call in ast.walk(function):
                if (
                    isinstance(call, ast.Call)
                    and isinstance(call.func, ast.Attribute)
                    and call.func.attr in VERBS
                    and ast.unparse(call.func.value).endswith("cluster")
                ):
                    found.add((file.stem, function.name, call.func.attr))
    return found


def needed_rights() -> dict[tuple[str, str], set[str]]:
    """Return the verbs that the code needs, by API group and resource."""
    needed: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for (_, _, method), kinds in CALLS.items():
        for kind in kinds:
            subresource = "/status" if method == "apply_status" else ""
            needed[group_of(kind), PLURALS[kind] + subresource].add(VERBS[method])
    for kind, subresource in PATCHED:
        needed[group_of(kind), f"{PLURALS[kind]}/{subresource}".removesuffix("/")].add("patch")
    # kopf's own requests.
    needed[group_of(TRAINING_RUN), PLURALS[TRAINING_RUN]] |= {"list", "watch"}
    children = [made for _, *objects in PLANS for made in objects]
    for owner in (owner for child in children for owner in child["metadata"].get("ownerReferences", ())):
        if owner["blockOwnerDeletion"]:
            kind = (owner["apiVersion"], owner["kind"])
            needed[group_of(kind), f"{PLURALS[kind]}/finalizers"].add("update")
    return dict(needed)


def group_of(kind: Kind) -> str:
    return kind[0].rpartition("/")[0]


def read_roles() -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Return the rules of the chart's roles by their kind and what their name ends with."""
    rights = read_rights(namespace="posttrain-system", lease="LEASE")
    return {
        (role["kind"], role["metadata"]["name"].removeprefix("posttrain-")): role["rules"]
        for role in rights
        if "rules" in role
    }


def granted(*rules: dict[str, Any]) -> dict[tuple[str, str], set[str]]:
    """Return the verbs that rules grant, by API group and resource; no right is granted twice."""
    rights: dict[tuple[str, str], set[str]] = defaultdict(set)
    for rule in rules:
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                assert not rights[group, resource] & set(rule["verbs"])
                rights[group, resource] |= set(rule["verbs"])
    return dict(rights)


def test_every_request_in_the_code_is_listed() -> None:
    assert find_calls() == CALLS.keys()


def test_the_operator_has_the_rights_that_its_code_needs_and_no_other() -> None:
    roles = read_roles()

    everywhere, own = roles["ClusterRole", "operator"], roles["Role", "operator"]

    assert granted(*everywhere, *own) == needed_rights()
    assert {resource for _, resource in granted(*own)} == {"leases"}


def test_the_lease_is_the_only_one_that_is_read_or_written() -> None:
    by_verbs = {tuple(rule["verbs"]): rule.get("resourceNames") for rule in read_roles()["Role", "operator"]}

    assert by_verbs == {("create",): None, ("get", "patch"): ["LEASE"]}


def test_no_role_has_a_wildcard_or_reads_a_secret() -> None:
    for rules in read_roles().values():
        for rule in rules:
            assert "*" not in {*rule["apiGroups"], *rule["resources"], *rule["verbs"]}
            if any(resource.startswith("secrets") for resource in rule["resources"]):
                assert rule["verbs"] == ["create"]
            assert not {"escalate", "bind", "impersonate"} & set(rule["verbs"])


def test_users_of_a_namespace_may_use_runs_and_read_their_status() -> None:
    roles = read_roles()

    assert granted(*roles["ClusterRole", "view"]) == {
        ("posttrain.dev", "trainingruns"): {"get", "list", "watch"},
        ("posttrain.dev", "trainingruns/status"): {"get"},
    }
    assert granted(*roles["ClusterRole", "edit"]) == {
        ("posttrain.dev", "trainingruns"): {
            *("get", "list", "watch", "create", "update", "patch", "delete", "deletecollection")
        },
        ("posttrain.dev", "trainingruns/status"): {"get"},
    }
