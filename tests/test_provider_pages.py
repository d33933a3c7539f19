"""What docs/providers/ says of permissions is what the code asks for, call by call."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import botocore.session
from botocore import xform_name

ROOT = Path(__file__).parent.parent
PROVIDERS = ROOT / "skyward" / "providers"
ACCOUNTS = PROVIDERS / "accounts.py"
SERVICES = ("ec2", "iam", "pricing", "service-quotas", "ssm", "sts")
# Of actions that are no call of boto3's here.
UNCALLED = {
    "ec2:RunInstances",  # CreateFleet's, in the caller's name
    "ec2:CreateTags",  # for what is tagged when it is made
    "iam:CreateServiceLinkedRole",  # EC2's own, for the first spot machine of an account
    "iam:PassRole",  # for machines with an instance profile
    "iam:TagInstanceProfile",  # for what is tagged when it is made
    "iam:TagRole",
    "ssm:StartSession",  # the AWS CLI's, which logs in
}
# docs.digitalocean.com/reference/api/scopes/droplet/create: scopes that have to go with it.
WITH_DROPLETS = {"droplet:read", "regions:read", "sizes:read", "actions:read", "image:read"}


def _nodes(*files: Path) -> Iterator[ast.AST]:
    for file in files:
        yield from ast.walk(ast.parse(file.read_text(encoding="utf-8")))


def _aws_actions() -> set[str]:
    """Return what the code calls or pages through, under any name that is an operation of a service it uses."""
    session = botocore.session.get_session()
    actions = {
        xform_name(operation): f"{service.replace('-', '')}:{operation}"
        for service in SERVICES
        for operation in session.get_service_model(service).operation_names
    }
    nodes = list(_nodes(*PROVIDERS.glob("aws/*.py"), ACCOUNTS))
    names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    paged = {
        str(node.args[1].value)
        for node in nodes
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "pages"
        and isinstance(node.args[1], ast.Constant)
    }
    return {actions[name] for name in names | paged if name in actions}


def test_the_policies_for_aws_have_every_call_and_no_other() -> None:
    page = (ROOT / "docs/providers/aws.md").read_text(encoding="utf-8")
    policies = [json.loads(text) for text in re.findall(r"^```json\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)]
    actions = [s["Action"] for policy in policies for s in policy["Statement"]]
    listed = [action for some in actions for action in ([some] if isinstance(some, str) else some)]

    called = _aws_actions()

    assert {"ec2:CreateFleet", "ec2:DescribeVpcs", "iam:PutRolePolicy", "pricing:GetProducts"} <= called
    assert sorted(listed) == sorted(called | UNCALLED)


def test_the_policy_for_plain_pools_has_nothing_of_roles() -> None:
    page = (ROOT / "docs/providers/aws.md").read_text(encoding="utf-8")
    plain, with_roles = re.findall(r"^```json\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)

    assert re.findall(r'"(iam:\w+)",?$', plain, re.MULTILINE) == ["iam:CreateServiceLinkedRole"]
    assert "ec2:" not in with_roles


def test_the_scopes_for_digitalocean_are_those_of_every_call() -> None:
    page = (ROOT / "docs/providers/digitalocean.md").read_text(encoding="utf-8")
    listed = re.findall(r"^(\w+:\w+)$", page, re.MULTILINE)
    description = json.loads((ROOT / "tests/clouds/data/digitalocean-openapi.json").read_text(encoding="utf-8"))
    scopes = {
        operation["operationId"].replace("_", "").lower(): set(operation["security"][0]["bearer_auth"])
        for methods in description["paths"].values()
        for operation in methods.values()
    }

    called = {
        f"{node.value.attr}{node.attr}".replace("_", "").lower()
        for node in _nodes(*PROVIDERS.glob("digitalocean/*.py"), ACCOUNTS)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute)
    } & set(scopes)

    assert {"dropletscreate", "dropletsdestroybytag", "firewallsupdate", "sshkeysdelete"} <= called
    assert sorted(listed) == sorted(set().union(*(scopes[call] for call in called)) | WITH_DROPLETS)
