"""The reference of the app's REST interface, made from its OpenAPI description."""

from __future__ import annotations

from typing import Any

from reference import cell, escaped  # beside this file

from qk_jax.app import server


def page() -> str:
    """The page: every request, then the fields of every object."""
    found = server.create_app(None).openapi()  # what it tells does not depend on the models
    parts = [
        "# REST",
        "What the [app](app.md#rest) answers, from its own description (`/openapi.json`).",
        "## Requests",
    ]
    for path, verbs in found["paths"].items():
        for verb, asked in verbs.items():
            parts += request(f"{verb.upper()} {path}", asked)
    parts.append("## Objects")
    for name, schema in sorted(found["components"]["schemas"].items()):
        if "properties" in schema:
            parts += [f"### {name}", escaped(schema.get("description", "")), fields(schema)]
    return "\n\n".join(part for part in parts if part) + "\n"


def request(name: str, asked: dict[str, Any]) -> list[str]:
    """One request: what it does, what it takes, what it answers."""
    takes = [
        f"Takes {kind(body['schema'])}."
        for body in asked.get("requestBody", {}).get("content", {}).values()
    ]
    rows = [
        f"| {status} | {', '.join(kind(x['schema']) for x in answer.get('content', {}).values())} "
        f"| {escaped(answer['description'])} |"
        for status, answer in asked["responses"].items()
    ]
    about = asked.get("description") or f"{asked['summary']}."
    table = "\n".join(["| status | answer | |", "| --- | --- | --- |", *rows])
    return [f"### `{name}`", *map(escaped, about.split("\n\n")), *takes, table]


def kind(schema: dict[str, Any]) -> str:
    """The type of a value, in words; an object is a link to its fields."""
    if name := schema.get("$ref", "").rpartition("/")[2]:
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(kind, schema["anyOf"])))
    if "allOf" in schema:
        return " and ".join(map(kind, schema["allOf"]))
    if schema.get("type") == "array":
        return f"list of {kind(schema['items'])}" if "items" in schema else "list"
    if "enum" in schema or "const" in schema:
        return " or ".join(cell(str(x)) for x in schema.get("enum", [schema.get("const")]))
    return schema.get("type", "anything")


def fields(schema: dict[str, Any]) -> str:
    """The table of an object's fields."""
    required = schema.get("required", [])
    rows = []
    for name, value in schema["properties"].items():
        default = "required" if name in required else value.get("default")
        shown = "" if default is None else cell(str(default))
        words = escaped(value.get("description", ""))
        rows.append(f"| `{name}` | {kind(value)} | {shown} | {words} |")
    return "\n".join(["| field | type | default | meaning |", "| --- | --- | --- | --- |", *rows])
