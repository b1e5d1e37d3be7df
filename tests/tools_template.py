"""A chat template that tells a model of its tools, as Hermes' and Qwen's do, tools to tell of, and deep schemas."""

from typing import Any

TEMPLATE = """{% if tools %}<|system|>
Call one of {{ tools | tojson }} as <tool_call>
{"name": ..., "arguments": ...}
</tool_call><|end|>
{% endif %}{% for message in messages %}<|{{ message.role }}|>
{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>
{%- endfor %}<|end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""


def tool(name: str, **properties: dict[str, Any]) -> dict[str, Any]:
    """A function of which all arguments are required."""
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": f"to {name}", "parameters": schema}}


CLAMP = tool("clamp", value={"type": "integer", "minimum": 0, "maximum": 99}, mode={"enum": ["low", "high"]})
SORT = tool("sort", by={"$ref": "#/$defs/key"})
SORT["function"]["parameters"]["$defs"] = {"key": {"enum": ["size", "name"]}}


def chain(num_links: int) -> dict[str, Any]:
    """A schema whose references lead from one part to the next, each a list of the next."""
    links = {f"a{i}": {"type": "array", "items": {"$ref": f"#/$defs/a{i + 1}"}} for i in range(num_links)}
    return {"$defs": links | {f"a{num_links}": {"type": "integer"}}, "$ref": "#/$defs/a0"}
