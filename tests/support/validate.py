"""Holds YAML files against the JSON Schema of models.yaml: validate.py SCHEMA FILE...

Prints `FILE: ok` or `FILE: PATH: what is wrong` per error; exits 0 unless something else fails.
"""

import json
import sys

import jsonschema
import yaml


class Loader(yaml.SafeLoader):
    """YAML 1.2: only true and false are booleans."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
BOOL = yaml.resolver.re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
Loader.add_implicit_resolver("tag:yaml.org,2002:bool", BOOL, list("tTfF"))
# 8051-8099 is no date, 10:00 no number of base 60.
for first in list(Loader.yaml_implicit_resolvers):
    Loader.yaml_implicit_resolvers[first] = [
        (tag, regexp)
        for tag, regexp in Loader.yaml_implicit_resolvers[first]
        if tag != "tag:yaml.org,2002:timestamp"
    ]

schema = json.load(open(sys.argv[1]))
jsonschema.Draft202012Validator.check_schema(schema)
validator = jsonschema.Draft202012Validator(schema)
for path in sys.argv[2:]:
    errors = list(validator.iter_errors(yaml.load(open(path), Loader)))
    for error in errors:
        print(f"{path}: {'.'.join(map(str, error.absolute_path))}: {error.message[:200]}")
    if not errors:
        print(f"{path}: ok")
