# Sourced by tests/run.sh: exports WHARF_TEST_DOCKER (and WHARF_TEST_DOCKER26) where an engine runs
# or can be started.
