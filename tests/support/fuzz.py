"""What schemathesis (SCHEMATHESIS_HOOKS) is told beyond the document: the names of models that exist."""

import os

import schemathesis
from hypothesis import strategies

NAMES = os.environ["WHARF_FUZZ_NAMES"].split(",")
schemathesis.openapi.format("model-name", strategies.sampled_from(NAMES))
